"""The adapters that a new one is kept apart from: read, checked, and what they read of each layer.

Legend: E experts of a layer, R rank, I in, K directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from veneer.adapter.card import Adapter
from veneer.adapter.experts import numbered
from veneer.adapter.faults import add_fault
from veneer.adapter.verify import check_base
from veneer.config.orthogonal import OrthogonalToSettings
from veneer.errors import AdapterError, ConfigError, WrongBaseError, listed
from veneer.lowrank import directions
from veneer.methods.base import Method
from veneer.methods.experts import ExpertLoRA
from veneer.methods.lora import LoRA
from veneer.model import fingerprint as fingerprints
from veneer.train.orthogonal import Orthogonality, basis_of


class Earlier(NamedTuple):
    """An adapter, and the folder that it was named by."""

    folder: str
    adapter: Adapter


def read_earlier(settings: OrthogonalToSettings) -> list[Earlier]:
    """The adapters that the settings name. Raises AdapterError with the faults of all."""
    faults: list[str] = []
    found: list[Earlier] = []
    for folder in settings.orthogonal_to:
        try:
            one = Earlier(folder, Adapter.load(folder))
        except AdapterError as error:
            faults.append(str(error))
            continue
        same = [other.folder for other in found if other.adapter.identity == one.adapter.identity]
        if same:
            faults.append(f"{folder} is the same adapter as {same[0]}; name it once")
        if one.adapter.card.method != "lora":
            faults.append(
                f"{folder} is of method {one.adapter.card.method}, which also changes what its A does not read; name "
                "adapters of plain LoRA"
            )
        found.append(one)
    if faults:
        raise AdapterError(listed("--orthogonal-to:", faults, "Or leave it out."))
    return found


def orthogonality(
    earlier: Sequence[Earlier], model: nn.Module, methods: Mapping[str, Method], settings: OrthogonalToSettings
) -> Orthogonality | None:
    """That of new methods (by path) to earlier adapters, A at its start; None where there are none.

    Raises WrongBaseError with every adapter that is not of this base; ConfigError where one has no layer in common with
    the new one, or where together they leave it no directions.
    """
    if not earlier:
        return None
    _check_bases(earlier, model)
    trained = {path: method for path, method in methods.items() if isinstance(method, LoRA)}
    read = _read_by_all(earlier, trained)
    _check_room(read, trained)
    about = {
        "adapters": [{"folder": one.folder, "identity": one.adapter.identity} for one in earlier],
        "layers": len(read),
        "layers_trained": len(trained),
        "lambda": settings.orthogonal_lambda,
        "start": settings.orthogonal_start,
    }
    return Orthogonality(trained, read, settings.orthogonal_lambda, settings.orthogonal_start, about)


def _read_by_all(earlier: Sequence[Earlier], trained: Mapping[str, LoRA]) -> dict[str, Tensor]:
    """Path -> what each adapter reads there, one after the other. Raises ConfigError where one reads nowhere."""
    each = [_read(one.adapter, trained) for one in earlier]
    strangers = [one.folder for one, read in zip(earlier, each, strict=True) if not read]
    if strangers:
        told = f"--orthogonal-to: {' and '.join(strangers)} changes none of the layers that are trained here"
        raise ConfigError(f"{told}; next: --target-modules that it has (veneer inspect tells them), or leave it out")
    found = {path: [read[path] for read in each if path in read] for path in trained}
    return {path: torch.cat(reads, -2) for path, reads in found.items() if reads}


def _check_bases(earlier: Sequence[Earlier], model: nn.Module) -> None:
    faults = []
    for one in earlier:
        try:
            check_base(one.adapter, model, fingerprints.of(model))
        except WrongBaseError as error:
            faults.append(f"{one.folder}: {error}")
    if faults:
        raise WrongBaseError(listed("--orthogonal-to:", faults, "Or leave it out."))


def _read(adapter: Adapter, trained: Mapping[str, LoRA]) -> dict[str, Tensor]:
    """Path -> the orthonormal directions that the adapter reads there, as rows (K, I), or (E, K, I) of experts."""
    held, found = set(adapter.modules()), {}
    for path, method in trained.items():
        modules = numbered(path, method.experts) if isinstance(method, ExpertLoRA) else [path]
        if not held.issuperset(modules):
            continue
        each = [directions(*adapter.factors(module))[1].mT for module in modules]
        # Of a layer's experts some may read fewer: rows of zeros are no directions.
        rows = pad_sequence(each, batch_first=True) if isinstance(method, ExpertLoRA) else each[0]
        if rows.shape[-2]:
            found[path] = rows.float()
    return found


def _check_room(read: Mapping[str, Tensor], trained: Mapping[str, LoRA]) -> None:
    """Raises ConfigError where a layer's inputs have fewer directions than all adapters together."""
    faults: list[str] = []
    full = {}
    for path, read_KI in read.items():
        taken = int((basis_of(read_KI).square().sum(-1) > 0).sum(-1).max())
        if taken + trained[path].rank > read_KI.shape[-1]:
            full[path] = f"{path} ({read_KI.shape[-1]} inputs, {taken} of them read, r {trained[path].rank})"
    add_fault(faults, "the earlier adapters leave fewer directions than r", list(full.values()))
    if faults:
        next_step = "Next: a lower --r, fewer adapters, or those at a lower rank (veneer convert IN OUT --rank N)."
        raise ConfigError(listed("--orthogonal-to:", faults, next_step))
