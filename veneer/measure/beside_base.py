"""An adapter on its base: does it belong there, how large is each update beside its weight, what did it bring in.

Legend: E experts, I in, O out.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.adapter.attach import attach, detach, methods_of
from veneer.adapter.card import Adapter
from veneer.bases.base import Base
from veneer.errors import NotMergeable
from veneer.measure.intruders import intruders
from veneer.methods.base import Method
from veneer.model.progress import shown
from veneer.model.swap import base_at
from veneer.model.vocabulary import embedding_path, head_path
from veneer.notes import Note

SLOT = "inspected"


@dataclass(frozen=True)
class OnBase:
    """An adapter on a base that it belongs to.

    notes: what could not be checked. ratios: path of a layer -> ‖W' - W‖ / ‖W‖. intruders: path -> how many of the ten
    strongest directions of W' are like none of W's (of experts: of all of them together); not of embedding and head,
    and not where the method has no merged weight.
    """

    notes: tuple[str, ...]
    ratios: dict[str, float]
    intruders: dict[str, int]


def on_base(adapter: Adapter, model: nn.Module, progress: bool = False) -> OnBase:
    """The model is as it was afterwards. Raises WrongBaseError where the adapter does not belong on it."""
    ends = (embedding_path(model), head_path(model))
    ratios, found = {}, {}
    notes = attach_silently(model, adapter, SLOT)
    try:
        methods = methods_of(model, SLOT)
        for path in shown(list(methods), "beside the base", progress):
            base = base_at(model, path)
            size = float(torch.linalg.vector_norm(base.row_norms()))
            ratios[path] = methods[path].update_norm(base) / size if size else float("inf")
            if path not in ends and (counted := _intruders(methods[path], base)) is not None:
                found[path] = counted
    finally:
        detach(model, SLOT)
    return OnBase(notes, ratios, found)


def attach_silently(model: nn.Module, adapter: Adapter, slot: str) -> tuple[str, ...]:
    """What `attach` tells, which is for the figures and not for the person as well; other warnings go on."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", Note)
        attach(model, adapter, slot)
    for one in told:
        if not issubclass(one.category, Note):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return tuple(str(one.message) for one in told if issubclass(one.category, Note))


@torch.no_grad()
def _intruders(method: Method, base: Base) -> int | None:
    """None where there is no merged weight."""
    try:
        tuned = method.merged(base)
    except NotMergeable:
        return None
    weights, tuned = _each(base.dense()), _each(tuned)
    return sum(intruders(weight_OI, tuned_OI) for weight_OI, tuned_OI in zip(weights, tuned, strict=True))


def _each(weight: Tensor) -> Tensor:
    """(E, O, I): of a layer of experts each, of another the one."""
    return weight if weight.dim() == 3 else weight[None]
