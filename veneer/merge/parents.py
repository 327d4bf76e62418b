"""Which adapters can be merged with each other, and what is known of the result before any arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.adapter.card import Adapter
from veneer.adapter.faults import SHOWN, add_fault
from veneer.errors import NotMergeable, WrongBaseError, listed
from veneer.model.fingerprint import UNKNOWN, Fingerprint, compare

_SHOWN_PARTS = ("template",)  # of a fingerprint: said, never refused
_NAMES = {"m": "a magnitude for each output (DoRA)", "c": "a bias", "o": "a bias", "rows": "rows of tokens"}
_ADVICE = {  # kinds of tensors -> what to do with an adapter that has them
    ("m",): "Merge a DoRA into its base by itself (veneer merge ADAPTER --into-base), or train the skill as lora.",
    ("rows",): "Merge rows of tokens into the base by themselves (veneer merge ADAPTER --into-base).",
    ("c", "o"): "Keep an adapter with biases as it is, or train the skill without them.",
}


def check_parents(adapters: Sequence[Adapter], names: Sequence[str]) -> list[str]:
    """Notes on what does not stop a merge. names: how the adapters are called in messages.

    Raises NotMergeable for adapters that hold more than a low-rank update, WrongBaseError for those that were not
    trained on one base; each with all faults.
    """
    _check_methods(adapters, names)
    faults, notes = _other_bases(adapters, names)
    other, unsure = _other_names(adapters, names)
    faults += other + _other_shapes(adapters, names)
    if faults:
        raise WrongBaseError(
            listed("These adapters are not of one base:", _some(faults), "Merge those of one base only.")
        )
    notes = _some(notes + unsure)
    unverified = [name for name, adapter in zip(names, adapters, strict=True) if adapter.card.base is None]
    add_fault(notes, "base unverified, not recorded", unverified)
    return notes + _some(_missing_layers(adapters, names))


def twice(identities: Sequence[str], names: Sequence[str]) -> list[str]:
    """Notes on adapters that are the same as one before them."""
    first: dict[str, int] = {}
    places = [(i, first.setdefault(identity, i)) for i, identity in enumerate(identities)]
    return _some([f"{names[i]} is the same adapter as {names[j]}" for i, j in places if j < i])


def _some(lines: list[str]) -> list[str]:
    """Of many lines, as three hundred adapters give, the first."""
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"and {len(lines) - SHOWN} more of these"]


def common_base(adapters: Sequence[Adapter]) -> Fingerprint | None:
    """Of each part what all adapters record; "unknown" where one does not, or where templates differ."""
    if any(adapter.card.base is None for adapter in adapters):
        return None
    recorded = [adapter.card.base.to_json() for adapter in adapters if adapter.card.base is not None]
    return Fingerprint(**{part: common([known[part] for known in recorded]) or UNKNOWN for part in recorded[0]})


def common(values: Sequence[Any]) -> Any:
    """The value that all of them are, else None."""
    return values[0] if all(value == values[0] for value in values) else None


def layers(adapters: Sequence[Adapter]) -> list[str]:
    """All layers that at least one adapter has, in the order of the first that has them."""
    return list(dict.fromkeys(module for adapter in adapters for module in adapter.modules()))


def _check_methods(adapters: Sequence[Adapter], names: Sequence[str]) -> None:
    faults = [
        f"{names[i]} is {adapter.card.method}: beside B·A it learned {', '.join(_more(adapter))}, which no sum of "
        "low-rank updates holds"
        for i, adapter in enumerate(adapters)
        if _more(adapter)
    ]
    if faults:
        kinds = {kind for adapter in adapters for kind in _kinds(adapter)}
        advice = [told for (which, told) in _ADVICE.items() if kinds & set(which)]
        raise NotMergeable(listed("These adapters cannot be merged with others:", faults, " ".join(advice)))


def _more(adapter: Adapter) -> list[str]:
    """What else than factors the adapter keeps."""
    return [_NAMES.get(kind, kind) for kind in _kinds(adapter)]


def _kinds(adapter: Adapter) -> list[str]:
    """Of tensors beside the factors."""
    return sorted({name.rpartition(".")[2] for name in adapter.tensors} - {"a", "b"})


def _other_bases(adapters: Sequence[Adapter], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Faults and notes: what each adapter records otherwise than one before it."""
    faults: list[str] = []
    notes: list[str] = []
    known = [(i, adapter.card.base) for i, adapter in enumerate(adapters) if adapter.card.base is not None]
    for n, (i, base) in enumerate(known):
        told: set[str] = set()
        for j, earlier in known[:n]:
            new = [difference for difference in compare(base, earlier) if difference.part not in told]
            told |= {difference.part for difference in new}
            for difference in new:
                where = notes if difference.part in _SHOWN_PARTS else faults
                where.append(f"{difference.part} of the base: {names[i]} was trained on another than {names[j]}")
    return faults, notes


def _other_names(adapters: Sequence[Adapter], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Faults and notes: bases that are called otherwise, where no fingerprint says what they are.

    A path and a hub's id may be one model, so that another name alone is told; where the layers' paths begin otherwise
    too (`model.layers` and `transformer.h`), it is another.
    """
    faults: list[str] = []
    notes: list[str] = []
    known = [i for i, adapter in enumerate(adapters) if adapter.card.base_name]
    for i in known[1:]:
        one, first = adapters[i], adapters[known[0]]
        if one.card.base_name == first.card.base_name or (one.card.base and first.card.base):
            continue
        line = f"{names[i]} names {one.card.base_name} as its base, {names[known[0]]} {first.card.base_name}"
        here, there = _beginnings(one), _beginnings(first)
        if here & there or not here or not there:
            notes.append(f"{line}: whether they are one is not verified, and the result names none")
        else:
            faults.append(f"{line}, and their layers are called otherwise: {min(here)}… and {min(there)}…")
    return faults, notes


def _beginnings(adapter: Adapter) -> set[str]:
    """The first two names of the paths of its layers, without those outside of all blocks, such as a head."""
    parts = [module.split(".") for module in adapter.modules()]
    return {".".join(names[:2]) for names in parts if len(names) > 2}


def _other_shapes(adapters: Sequence[Adapter], names: Sequence[str]) -> list[str]:
    seen: dict[str, tuple[int, int, int]] = {}
    faults: list[str] = []
    found = []
    for i, adapter in enumerate(adapters):
        for module in adapter.modules():
            a_RI, b_OR = adapter.factors(module)
            j, outputs, inputs = seen.setdefault(module, (i, len(b_OR), a_RI.shape[1]))
            if (len(b_OR), a_RI.shape[1]) != (outputs, inputs):
                here, there = [len(b_OR), a_RI.shape[1]], [outputs, inputs]
                found.append(f"{module} ({names[j]} {there}, {names[i]} {here})")
    add_fault(faults, "layers of other shapes [out, in]", found)
    return faults


def _missing_layers(adapters: Sequence[Adapter], names: Sequence[str]) -> list[str]:
    every, notes = layers(adapters), []
    for i, adapter in enumerate(adapters):
        own = set(adapter.modules())
        told: list[str] = []
        missing = [module for module in every if module not in own]
        add_fault(
            told, f"{names[i]} has nothing for {len(missing)} of {len(every)} layers, merged without it", missing, 2
        )
        notes += told
    return notes
