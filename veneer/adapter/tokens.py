"""What an adapter does to the ends of a model, token embedding and vocabulary head: rows of tokens, and tied weights.

Legend: N tokens that are trained, V vocabulary, D hidden size.

PEFT's rules: the rows of a list are the embedding's, and the head's too where that is tied to it; a factor pair is of
the one module that it names, tied or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter import patterns
from veneer.adapter.added import new_rows, unfit_added
from veneer.adapter.card import Adapter
from veneer.adapter.faults import add_fault
from veneer.adapter.peft_vocabulary import ADDED, COPIES, EMBEDDINGS, ROWS, digest
from veneer.bases.base import Base
from veneer.bases.dense import Dense
from veneer.bases.lookup import Lookup
from veneer.config import LoraSettings
from veneer.errors import AdapterError, ConfigError, NotMergeable, listed
from veneer.methods.base import Method
from veneer.methods.init import INITS, Start, lookup
from veneer.methods.rows import TokenRows, rows_of
from veneer.model.added_tokens import OPTION as ADD_TOKENS
from veneer.model.leaf import Leaf
from veneer.model.swap import base_at, check_adaptable
from veneer.model.vocabulary import embedding_path, head_path, is_tied
from veneer.notes import tell

OPTION = "--trainable-token-indices"


def start_of(base: Base, settings: LoraSettings, path: str) -> Start:
    """How the factors of a layer start. Raises ConfigError for a method that an embedding cannot have."""
    start = INITS[settings.init_lora_weights]
    if not isinstance(base, Lookup):
        return start
    if settings.method != "lora":
        raise ConfigError(
            f"--method {settings.method}: {path} is an embedding, which takes plain LoRA only; next: leave it out of "
            "--target-modules, or --method lora"
        )
    return start if start.anchored else Start(lookup)


def tell_tied(model: nn.Module, targets: Sequence[str]) -> None:
    """Warns where one of two that are tied is adapted as if it were alone."""
    ends = [path for path in map(str, (embedding_path(model), head_path(model))) if path in targets]
    if ends and is_tied(model):
        tell(
            f"{embedding_path(model)} and {head_path(model)} share one weight (tied); each update is of "
            f"{' or of '.join(ends)} alone, as in PEFT, so it cannot be merged into that weight"
        )


def rows_from_settings(
    model: nn.Module, settings: LoraSettings, targets: Sequence[str], added: Sequence[int] = ()
) -> dict[str, Method]:
    """Path -> rows to train, starting as the base's, those of added tokens as `new_rows`. Raises ConfigError with every
    fault."""
    given = settings.trainable_token_indices
    if not given and not added:
        return {}
    ends = [path for path in (embedding_path(model), head_path(model)) if path is not None]
    if not ends:
        raise ConfigError(f"{OPTION}: this model has no token embedding that is known")
    faults: list[str] = []
    wanted = _with_added(_wanted(given, ends, faults) if given else {}, ends, added, is_tied(model))
    for path, ids in wanted.items():
        check_adaptable(model, path)
        faults += _id_faults(path, ids, _vocabulary(model, path), added)
    add_fault(faults, "both rows and factors (leave it out of --target-modules)", [p for p in wanted if p in targets])
    tied = is_tied(model)
    if tied and len({tuple(ids) for ids in wanted.values()}) > 1:
        faults.append(f"{' and '.join(ends)} share one weight (tied), and get different tokens; name each in both")
    if tied and settings.method != "lora" and ends[-1] in targets and ends[0] in wanted:
        faults.append(f"{ends[-1]} shares the weight whose rows are trained, which goes with --method lora only")
    if faults:
        option = OPTION if given else ADD_TOKENS
        raise ConfigError(listed(f"{option}:", faults, "Wanted token ids, or MODULE: ids, of this base."))
    if tied and ends[0] in wanted:
        wanted = {ends[0]: wanted[ends[0]]}  # the head has them by being tied
    elif len(wanted) < len(ends):
        _tell_one_table(next(iter(wanted)), next(path for path in ends if path not in wanted), tied)
    return {path: _new_rows(model, path, ids, added) for path, ids in wanted.items()}


def _wanted(given: Any, ends: Sequence[str], faults: list[str]) -> dict[str, list[int]]:
    """Path -> ids; a plain list is the embedding's."""
    if isinstance(given, list):
        return {ends[0]: given}
    found = {name: patterns.named([name], ends) for name in given}
    unknown = [f"{name!r:.80}" for name, paths in found.items() if not paths]
    add_fault(faults, f"modules whose rows are not tokens (wanted {' or '.join(ends)})", unknown)
    return {paths[0]: given[name] for name, paths in found.items() if paths}


def _with_added(
    wanted: Mapping[str, list[int]], ends: Sequence[str], added: Sequence[int], tied: bool
) -> dict[str, list[int]]:
    """The ids of added tokens behind the others, in both ends; a tied head has those of the embedding."""
    if not added:
        return dict(wanted)
    paths = ends[:1] if tied and ends[-1] not in wanted else ends
    return {path: [*wanted.get(path, []), *added] for path in paths}


def _id_faults(path: str, ids: Sequence[int], vocabulary: int, added: Sequence[int] = ()) -> list[str]:
    faults: list[str] = []
    outside = [str(i) for i in sorted(set(ids) - set(added)) if not 0 <= i < vocabulary]
    add_fault(faults, f"{path}: ids outside its {vocabulary} rows, 0 to {vocabulary - 1}", outside)
    add_fault(faults, f"{path}: ids given twice", [str(i) for i in sorted(set(ids)) if list(ids).count(i) > 1])
    return faults if ids else [f"{path}: no ids"]


def _tell_one_table(path: str, other: str, tied: bool) -> None:
    told = "share one weight (tied), so it cannot be merged" if tied else "have tables of their own"
    tell(
        f"{OPTION}: rows of {path} alone are trained; {path} and {other} {told}. For both: "
        f'{OPTION} \'{{"{path}": [...], "{other}": [...]}}\''
    )


def _vocabulary(model: nn.Module, path: str) -> int:
    return len(model.get_submodule(path).weight)


def _new_rows(model: nn.Module, path: str, ids: Sequence[int], added: Sequence[int]) -> TokenRows:
    base, ids_N = base_at(model, path), torch.tensor(list(ids))
    rows_ND = rows_of(base, ids_N).cpu()
    if added:
        rows_ND[torch.isin(ids_N, torch.tensor(list(added)))] = new_rows(model, path)
    return TokenRows(rows_ND, ids, len(base.weight))


def rows_from_adapter(model: nn.Module, adapter: Adapter) -> dict[str, Method]:
    """Path -> the adapter's rows. Raises AdapterError where a tied head has a method that they do not go with."""
    rows = adapter.rows()
    head = head_path(model)
    if rows and head in adapter.modules() and adapter.card.method != "lora" and is_tied(model):
        raise AdapterError(f"{head} shares the weight whose rows are trained, which goes with plain LoRA only")
    return {path: TokenRows(t.clone(), ids, _vocabulary(model, path)) for path, (ids, t) in rows.items()}


def about_vocabulary(model: nn.Module, methods: Mapping[str, Method]) -> dict[str, Any]:
    """What a card's settings tell: which modules are embeddings, and whose rows the adapter has."""
    embedding = embedding_path(model)
    embeddings = [path for path, method in methods.items() if path == embedding and not isinstance(method, TokenRows)]
    rows = {path: method.ids for path, method in methods.items() if isinstance(method, TokenRows)}
    return {**({EMBEDDINGS: embeddings} if embeddings else {}), **({ROWS: rows} if rows else {})}


def unfit_vocabulary(adapter: Adapter, model: Any) -> list[str]:
    """Why an adapter's embeddings and rows do not fit this model."""
    settings = adapter.card.settings
    faults = unfit_added(adapter, model)
    added = [token for _, token in settings.get(ADDED, [])]
    embedding, head = embedding_path(model), head_path(model)
    told = settings.get(EMBEDDINGS, [])
    add_fault(faults, "adapted as an embedding, which is no token embedding here", [p for p in told if p != embedding])
    plain = [p for p in adapter.modules() if p == embedding and p not in told]
    add_fault(faults, "adapted as a linear layer, which is an embedding here", plain)
    for path, (ids, rows_ND) in adapter.rows().items():
        if path not in (embedding, head):
            faults.append(f"{path}: rows of tokens, and it is neither token embedding nor vocabulary head here")
            continue
        weight = model.get_submodule(path).weight
        faults += _id_faults(path, ids, len(weight), added)
        if rows_ND.shape[1] != weight.shape[1]:
            faults.append(f"{path}: rows of {rows_ND.shape[1]} numbers, the model has {weight.shape[1]}")
    return faults + _copy_faults(settings.get(COPIES, {}), model)


def _copy_faults(copies: Mapping[str, str], model: Any) -> list[str]:
    """PEFT puts a copy of an adapted embedding into the folder, and then into the model: it must be the base's."""
    modules = dict(model.named_modules())
    weights = {path: getattr(modules.get(path), "weight", None) for path in copies}
    known = {path: weight for path, weight in weights.items() if isinstance(weight, Tensor)}
    other = [path for path in copies if path not in known or digest(known[path]) != copies[path]]
    faults: list[str] = []
    add_fault(faults, "base weights inside the adapter that are not this base's (resized, or trained on?)", other)
    return faults


def check_merge(model: nn.Module, methods: Mapping[str, Method], merged: Mapping[str, Tensor]) -> bool:
    """Whether what is merged changes a weight that embedding and head share, in both alike.

    Raises NotMergeable where one weight would become two: nothing is changed.
    """
    embedding, head = str(embedding_path(model)), str(head_path(model))
    touched = [path for path in (embedding, head) if path in merged]
    if not touched or not is_tied(model):
        return False
    if head not in merged and isinstance(methods.get(embedding), TokenRows):
        return True  # the head has these rows, too
    if len(touched) == 2:
        first_VD, second_VD = merged[touched[0]].t(), merged[touched[1]]
        if torch.allclose(first_VD, second_VD, rtol=1e-5, atol=1e-6 * second_VD.abs().max().item()):
            return True
    raise NotMergeable(
        f"{embedding} and {head} share one weight (tied), and what was learned is of {' and of '.join(touched)} alone: "
        "merged, it would change the other too. Next: keep the adapter beside the base, or train on an untied base"
    )


def tie_weights(model: nn.Module) -> None:
    """Gives the head the weight that the embedding has since it was merged."""
    embedding, head = (model.get_submodule(str(path)) for path in (embedding_path(model), head_path(model)))
    assert isinstance(embedding, Leaf) and isinstance(head, Leaf)
    head.base = Dense(embedding.base.weight, head.base.bias)
