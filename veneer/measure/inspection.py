"""All that `veneer inspect` measures of a list of adapter folders, as one plain value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from veneer.adapter.card import CARD, Adapter
from veneer.adapter.faults import add_fault
from veneer.errors import AdapterError, NotMergeable, WrongBaseError, listed
from veneer.measure import layers
from veneer.measure.beside_base import OnBase, on_base
from veneer.measure.figures import measure
from veneer.measure.pairs import Pair
from veneer.measure.servers.server import Verdict, check
from veneer.measure.servers.table import server_named
from veneer.measure.servers.traits import PeftFiles
from veneer.measure.together import Together
from veneer.merge.parents import check_parents

FEW = 8  # adapters of which every pair is told
EXTREMES = 10  # pairs of a kind that are told of more than that
_NOTES = 8


@dataclass(frozen=True)
class Inspected:
    """One adapter: what it says of itself, and figures by layer, by kind of layer and in all (None without layers)."""

    name: str
    folder: str
    adapter: Adapter
    has_card: bool
    updates: dict[str, layers.Update]
    kinds: dict[str, layers.Summary]
    whole: layers.Summary | None
    base: OnBase | None
    verdict: Verdict | None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "folder": self.folder,
            "card": self.card(),
            "all": self.whole and asdict(self.whole),
            "kinds": {kind: asdict(found) for kind, found in self.kinds.items()},
            "layers": {module: asdict(found) for module, found in self.updates.items()},
            "base": self.base and asdict(self.base),
            "target": self.verdict and self.verdict.to_json(),
        }

    def card(self) -> dict[str, Any]:
        """What the folder says, and whether its bytes are those that the card was written for."""
        card, base = self.adapter.card, self.adapter.card.base
        return {
            "verified": self.has_card,  # a card for other bytes is refused at load
            "identity": self.adapter.identity,
            "method": card.method,
            "base_name": card.base_name,
            "fingerprint": base and base.to_json(),
            "storage": card.storage,
            "system_prompt": card.system_prompt,
            "parents": list(card.parents),
            "token_rows": {module: len(ids) for module, (ids, _) in self.adapter.rows().items()},
            "created": card.created,
            "veneer_version": card.veneer_version,
        }


@dataclass(frozen=True)
class Inspection:
    """Every adapter, and of several every pair and the sum of all. rank: that to which energies were cut."""

    rank: int
    adapters: tuple[Inspected, ...]
    pairs: tuple[Pair, ...]
    together: Together | None
    notes: tuple[str, ...]

    @property
    def loads(self) -> bool:
        """Whether the target, if one was given, loads all adapters."""
        return all(one.verdict is None or one.verdict.loads for one in self.adapters)

    def to_json(self) -> dict[str, Any]:
        """Of more than eight adapters the extreme pairs alone."""
        few = len(self.adapters) <= FEW
        told = self.told(self.pairs) if few else {kind: self.told(found) for kind, found in self.extremes().items()}
        return {
            "rank": self.rank,
            "adapters": [one.to_json() for one in self.adapters],
            "pairs": told if self.pairs else None,
            "together": self.together and self._together(self.together),
            "notes": list(self.notes),
        }

    def extremes(self) -> dict[str, list[Pair]]:
        """The pairs that are most alike, that pull against each other most, and that interfere most."""
        shared = [pair for pair in self.pairs if pair.layers]
        by = {"closest": "cosine", "conflicting": "sign_conflict_weighted", "interfering": "interference_share"}
        return {
            kind: sorted(shared, key=lambda pair: -getattr(pair, measure))[:EXTREMES] for kind, measure in by.items()
        }

    def told(self, found: Sequence[Pair]) -> list[dict[str, Any]]:
        """Pairs with names in the place of numbers."""
        names = [one.name for one in self.adapters]
        return [{**asdict(pair), "first": names[pair.first], "second": names[pair.second]} for pair in found]

    def _together(self, found: Together) -> dict[str, Any]:
        alignment = {one.name: ratio for one, ratio in zip(self.adapters, found.alignment, strict=True)}
        return {**asdict(found), "alignment": alignment}


def inspect(
    folders: Sequence[str],
    model: nn.Module | None = None,
    target: str | None = None,
    rank: int | None = None,
    progress: bool = True,
) -> Inspection:
    """Measures the adapters of these folders, on a base where one is given.

    target: name in SERVERS. rank: to which energies are cut, the largest of the adapters by default, and which the
    target is started for. Raises AdapterError for folders that cannot be loaded or compared, WrongBaseError for
    adapters that do not belong on the base.
    """
    adapters = [Adapter.load(folder) for folder in folders]
    _check_shapes(folders, adapters)
    wanted = rank or max([*(rank for one in adapters for rank in one.card.ranks.values()), 1])
    verdicts = [_verdict(folder, target, rank, model) if target else None for folder in folders]
    bases = [on_base(adapter, model, progress) if model is not None else None for adapter in adapters]
    figures = measure(adapters, wanted, progress)
    found = [
        _inspected(*each)
        for each in zip(_names(folders), folders, adapters, figures.updates, bases, verdicts, strict=True)
    ]
    return Inspection(
        rank=wanted,
        adapters=tuple(found),
        pairs=tuple(figures.pairs),
        together=figures.together,
        notes=tuple(_notes(adapters, found, target, model)),
    )


def _inspected(
    name: str,
    folder: str,
    adapter: Adapter,
    updates: dict[str, layers.Update],
    base: OnBase | None,
    verdict: Verdict | None,
) -> Inspected:
    modules = adapter.modules()
    return Inspected(
        name=name,
        folder=str(folder),
        adapter=adapter,
        has_card=(Path(folder) / CARD).exists(),
        updates=updates,
        kinds={kind: layers.summary(adapter, updates, those) for kind, those in layers.by_kind(modules).items()},
        whole=layers.summary(adapter, updates, modules) if modules else None,
        base=base,
        verdict=verdict,
    )


def _verdict(folder: str, target: str, limit: int | None, model: nn.Module | None) -> Verdict:
    tied = None if model is None else bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    return check(server_named(target), PeftFiles.read(folder), str(folder), limit, tied)


def _names(folders: Sequence[str]) -> list[str]:
    """The last part of each folder, or all of it where two would be called alike."""
    short = [Path(folder).resolve().name for folder in folders]
    return [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]


def _check_shapes(folders: Sequence[str], adapters: Sequence[Adapter]) -> None:
    """Raises AdapterError for layers of one name and several shapes, which cannot be compared."""
    seen: dict[str, tuple[int, int, int]] = {}
    faults: list[str] = []
    wrong: dict[tuple[str, str], list[str]] = {}
    for i, adapter in enumerate(adapters):
        for module in adapter.modules():
            a_RI, b_OR = adapter.factors(module)
            j, *shape = seen.setdefault(module, (i, len(b_OR), a_RI.shape[1]))
            if shape != [len(b_OR), a_RI.shape[1]]:
                told = f"{module} {shape} and {[len(b_OR), a_RI.shape[1]]}"
                wrong.setdefault((str(folders[j]), str(folders[i])), []).append(told)
    for (first, second), places in wrong.items():
        add_fault(faults, f"{first} and {second}, layers of other shapes [out, in]", places, 2)
    if faults:
        raise AdapterError(listed("These adapters cannot be compared:", faults[:_NOTES], "Inspect those of one base."))


def _notes(
    adapters: Sequence[Adapter], found: Sequence[Inspected], target: str | None, model: nn.Module | None
) -> list[str]:
    notes = [f"{one.name}: {note}" for one in found if one.base for note in one.base.notes]
    notes += [
        f"{one.name}: beside B·A it learned more ({one.adapter.card.method}); measured is B·A"
        for one in found
        if _more(one)
    ]
    if target and model is None:
        notes.append(f"whether the base that {target} serves has these layers is not checked; --base-model checks it")
    if len(adapters) > 1:
        try:
            notes += check_parents(adapters, [one.name for one in found])
        except (NotMergeable, WrongBaseError) as error:
            notes.append("as they are, they cannot be merged. " + str(error))
    more = [f"{len(notes) - _NOTES} more notes"] if len(notes) > _NOTES else []
    return notes[:_NOTES] + more


def _more(one: Inspected) -> bool:
    return one.adapter.card.method != "lora"


def kinds_beside_base(one: Inspected) -> Mapping[str, tuple[float, float, int | None]]:
    """Kind of layer, and all -> median and largest ‖ΔW‖ / ‖W‖, and how many intruders (None: not counted)."""
    if one.base is None:
        return {}
    told = {}
    for kind, paths in {**layers.by_kind(one.base.ratios), "all": list(one.base.ratios)}.items():
        ratios = [one.base.ratios[path] for path in paths]
        counted = [one.base.intruders[path] for path in paths if path in one.base.intruders]
        told[kind] = (layers.median(ratios), max(ratios), sum(counted) if counted else None)
    return told
