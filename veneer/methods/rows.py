"""Rows of the vocabulary, trained as they are: what PEFT calls trainable tokens.

Legend: N tokens that are trained, V vocabulary, D hidden size, T tokens of a call; as a base O and I are these two.

A row stands in the place of the base's, it is not added to it: what the base has there (of a token that was never
trained, say, random numbers) does not matter to what was learned. Ids may lie beyond the base's table, which stays as
it is: there the base has zeros, and only who has the rows sees and says these tokens (`veneer.model.vocabulary`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.bases.base import Base
from veneer.bases.lookup import Lookup
from veneer.methods.base import Method


class TokenRows(Method):
    """Rows (N, D), float32, of the tokens `ids`, in an embedding or in a vocabulary head. No member of METHODS: an
    adapter has them beside the factors of one.

    vocabulary: rows of the base's table; ids beyond it make it larger.
    """

    name = "rows"
    kinds = ("rows",)
    scale = 1.0
    rank = 0
    ids_N: Tensor
    place_V: Tensor

    def __init__(self, rows_ND: Tensor, ids: Sequence[int], vocabulary: int) -> None:
        super().__init__()
        self.rows_ND = nn.Parameter(rows_ND)
        ids_N = torch.tensor(list(ids), dtype=torch.int64)
        vocabulary = max(vocabulary, int(ids_N.max()) + 1)
        place_V = torch.full((vocabulary,), -1, dtype=torch.int64)  # where a token's row stands; -1: it has none
        place_V[ids_N] = torch.arange(len(ids_N))
        self.register_buffer("ids_N", ids_N, persistent=False)
        self.register_buffer("place_V", place_V, persistent=False)

    @property
    def ids(self) -> list[int]:
        return self.ids_N.tolist()

    @property
    def vocabulary(self) -> int:
        """Rows of the table with all ids in it."""
        return len(self.place_V)

    def places(self, ids_T: Tensor) -> Tensor:
        """Where the tokens' rows stand (T); -1: they have none."""
        return self.place_V[ids_T.clamp_max(self.vocabulary - 1)].where(ids_T < self.vocabulary, -1)

    def embedded(self, ids_T: Tensor, y_TD: Tensor) -> Tensor:
        """Δ (T, D) of tokens that the base has embedded as y_TD: its row less y where a token has one, else 0."""
        place_T = self.places(ids_T)
        rows_TD = self.rows_ND[place_T.clamp_min(0)].to(y_TD.dtype)
        return torch.where((place_T >= 0)[:, None], rows_TD - y_TD, 0.0)

    def delta(self, x_TI: Tensor, y_TO: Tensor, base: Base, gate_TR: Tensor | None = None) -> Tensor:
        """For the logits y_TO of a head, its input x_TI (T, D); (T, vocabulary). Raises ValueError with a gate."""
        if gate_TR is not None:
            raise ValueError("rows of the vocabulary cannot be gated by rank: they are of no rank")
        moved_ND = self.rows_ND - rows_of(base, self.ids_N)  # not of the products: zero at the start, to the bit
        zeros_TV = y_TO.new_zeros(len(y_TO), self.vocabulary)
        return zeros_TV.index_copy(1, self.ids_N, x_TI @ moved_ND.to(x_TI.dtype).t())

    def merged(self, base: Base) -> Tensor:
        weight_OI = base.dense()
        weight_VD = weight_OI.t() if isinstance(base, Lookup) else weight_OI
        weight_VD = F.pad(weight_VD, (0, 0, 0, self.vocabulary - len(weight_VD)))
        weight_VD[self.ids_N] = self.rows_ND.detach().to(weight_VD)
        return weight_VD.t() if isinstance(base, Lookup) else weight_VD

    def update_norm(self, base: Base) -> float:
        return torch.linalg.vector_norm(self.rows_ND.detach() - rows_of(base, self.ids_N)).item()

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows_ND.detach().to(torch.float32, copy=True)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        found, wanted = tuple(tensors["rows"].shape), tuple(self.rows_ND.shape)
        if found != wanted:
            raise ValueError(f"got rows {found}, wanted {wanted}")
        self.rows_ND.data.copy_(tensors["rows"])


def rows_of(base: Base, ids_N: Tensor) -> Tensor:
    """The rows (N, D) that a dense embedding or head has for these tokens, float32, a copy; zeros beyond its table."""
    weight_VD, ids_N = base.weight.detach(), ids_N.to(base.device)  # (V, D) in both
    rows_ND = weight_VD[ids_N.clamp_max(len(weight_VD) - 1)].to(torch.float32, copy=True)
    return rows_ND.masked_fill_((ids_N >= len(weight_VD))[:, None], 0.0)
