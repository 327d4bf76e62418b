"""Adapters on each other's data: what each one changes there, alone and added to the one whose data it is.

Losses are those of `veneer eval`, with its intervals; the rows of a file are read as its own adapter was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from veneer.adapter.attach import detach
from veneer.adapter.card import Adapter
from veneer.data.chat import Template
from veneer.data.encode import encode
from veneer.data.files import Row
from veneer.data.sources import read_several, read_source
from veneer.errors import AdapterError
from veneer.evaluate.foretold import gain_kept
from veneer.evaluate.intervals import Score
from veneer.evaluate.run import check_family, evaluate
from veneer.measure.beside_base import attach_silently
from veneer.measure.functional import Functional, functional
from veneer.model.likelihood import Likelihood, sequence_likelihoods
from veneer.model.packed import wiring_of

METRICS = ("loss",)
SUM, HALVES = 1.0, 0.5  # of each of two adapters


@dataclass(frozen=True)
class Beside:
    """What adapter `other` does to the data of another one, A.

    loss, change: of `other` alone, and less the base's. summed, summed_change: of A + other, and less that of A alone;
    halved, halved_change: the same of A/2 + other/2. kept: of what A gained on the base, the share that A/2 + other/2
    keeps; None where no gain is told apart from none, below 0 where the base does better. functional: what `other`
    writes there beside A.
    """

    other: int
    loss: Score
    change: Score
    summed: Score
    summed_change: Score
    halved: Score
    halved_change: Score
    kept: float | None
    functional: Functional


@dataclass(frozen=True)
class OnFile:
    """The data of one adapter: nats per token under the base and under it alone, the change, and all others there."""

    adapter: int
    file: str
    rows: int
    base: Score
    loss: Score
    change: Score
    beside: tuple[Beside, ...]
    notes: tuple[str, ...]

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """With names in the place of numbers."""
        beside = [{**asdict(one), "other": names[one.other]} for one in self.beside]
        return {**asdict(self), "adapter": names[self.adapter], "beside": beside, "notes": list(self.notes)}


def read_files(files: Sequence[str], columns: Mapping[Any, str] | None, limit: int | None) -> list[list[Row]]:
    """The rows of every file. Raises DataError with what is wrong with any of them, of all that cannot be read."""

    def read(file: str) -> list[Row]:
        rows = read_source(file, columns, limit).rows
        check_family(rows, METRICS, file)
        return rows

    return read_several(files, read, "Of the data files, one for each adapter:")


def on_data(
    loaded: Any,
    adapters: Sequence[Adapter],
    names: Sequence[str],
    files: Sequence[str],
    rows: Sequence[Sequence[Row]],
    seed: int = 0,
    max_length: int | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> tuple[OnFile, ...]:
    """One adapter's data after the other's. The model is as it was afterwards.

    rows: of each adapter's file. max_length: of a row in tokens; None: as its adapter was trained. Raises AdapterError
    for adapters with added tokens, DataError for rows that cannot be used (of every file, before anything is
    measured), ModelError for a loss that is not finite.
    """
    slots = [f"on_data_{number}" for number in range(len(adapters))]
    attached: list[str] = []
    try:
        for adapter, slot in zip(adapters, slots, strict=True):
            attach_silently(loaded.model, adapter, slot)  # what it tells stands in the inspection
            attached.append(slot)
        _check_tokens(loaded.model, slots, names)
        templates = [Template(loaded.tokenizer, adapter.card.system_prompt) for adapter in adapters]
        lengths = [max_length or adapter.card.max_length for adapter in adapters]
        each = zip(rows, templates, lengths, files, strict=True)
        encoded = [encode(those, template, length, file).examples for those, template, length, file in each]
        found = []
        for own, examples in enumerate(encoded):
            progress(f"{names[own]}: what the others write on {len(rows[own]):,} rows")
            written = functional(loaded.model, adapters, own, slots[own], examples)
            read = {"system_prompt": adapters[own].card.system_prompt, "max_length": lengths[own]}
            speakers = _Speakers(
                loaded, slots, names, rows[own], files[own], read, seed, progress, _unmeasured(adapters, names)
            )
            found.append(_on_file(speakers, own, written))
        return tuple(found)
    finally:
        for slot in attached:
            detach(loaded.model, slot)


def _check_tokens(model: Any, slots: Sequence[str], names: Sequence[str]) -> None:
    grown = [name for slot, name in zip(slots, names, strict=True) if slot in wiring_of(model).extended]
    if grown:
        raise AdapterError(
            f"{', '.join(grown)}: adapters with added tokens read a text in tokens of their own, so that losses beside "
            "others cannot be compared. Next: leave --dataset out, or veneer eval with one of them"
        )


def _unmeasured(adapters: Sequence[Adapter], names: Sequence[str]) -> list[str]:
    dora = [name for adapter, name in zip(adapters, names, strict=True) if adapter.card.method == "dora"]
    told = "of DoRA, what it writes on others' inputs is told of B·A alone, its magnitudes left out; losses are whole"
    return [f"{', '.join(dora)}: {told}"] if dora else []


@dataclass
class _Speakers:
    """One file, and what is asked of it: losses of adapters and of sums of two, each of them computed once."""

    loaded: Any
    slots: Sequence[str]
    names: Sequence[str]
    rows: Sequence[Row]
    file: str
    read: Mapping[str, Any]  # how the rows are read, for `evaluate`
    seed: int
    progress: Callable[[str], None]
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        self._weights: dict[str, dict[str, float]] = {}
        self._known: dict[str | None, Sequence[Likelihood]] = {}

    def alone(self) -> Any:
        """The base and every adapter; changes are from the base."""
        return self._result({"base": None, **{self._label(i): slot for i, slot in enumerate(self.slots)}})

    def added(self, own: int) -> Any:
        """One adapter, and its sums with each other; changes are from that adapter alone."""
        slots = {self._label(own): self.slots[own]}
        for other in range(len(self.slots)):
            if other != own:
                slots |= {self.sum_label(own, other, weight): self._sum(own, other, weight) for weight in (SUM, HALVES)}
        return self._result(slots)

    def sum_label(self, own: int, other: int, weight: float) -> str:
        return f"{weight:g} ({self._label(own)} + {self._label(other)})"

    def _label(self, place: int) -> str:
        return f"{place + 1}. {self.names[place]}"  # numbered: two adapters, or one and the base, may be called alike

    def _sum(self, own: int, other: int, weight: float) -> str:
        name = f"{own}+{other} {weight:g}"
        self._weights[name] = {self.slots[own]: weight, self.slots[other]: weight}
        return name

    def _result(self, slots: Mapping[str, str | None]) -> Any:
        return evaluate(
            self.loaded,
            self.rows,
            slots=slots,
            metrics=METRICS,
            seed=self.seed,
            **self.read,
            where=self.file,
            likelihoods=self._likelihoods,
            progress=self.progress,
        )

    def _likelihoods(self, model: Any, examples: Sequence[Any], slot: str | None) -> Sequence[Likelihood]:
        if slot not in self._known:
            self._known[slot] = sequence_likelihoods(model, examples, self._weights.get(slot or "", slot))
        return self._known[slot]


def _kept(base: Score, alone: Score, change: Score, merged: Score) -> float | None:
    if change.high is None or change.high >= 0:
        return None
    return gain_kept(base.score, alone.score, merged.score)


def _on_file(speakers: _Speakers, own: int, written: Mapping[int, Functional]) -> OnFile:
    alone, added = speakers.alone(), speakers.added(own)
    [base, *losses], changes = alone.metrics["loss"].values(), list(alone.differences["loss"].values())
    sums, sum_changes = added.metrics["loss"], added.differences["loss"]
    beside = []
    for other, found in written.items():
        summed, halved = (speakers.sum_label(own, other, weight) for weight in (SUM, HALVES))
        beside.append(
            Beside(
                other=other,
                loss=losses[other],
                change=changes[other],
                summed=sums[summed],
                summed_change=sum_changes[summed],
                halved=sums[halved],
                halved_change=sum_changes[halved],
                kept=_kept(base, losses[own], changes[own], sums[halved]),
                functional=found,
            )
        )
    notes = (*alone.notes, *speakers.notes)
    return OnFile(own, speakers.file, len(speakers.rows), base, losses[own], changes[own], tuple(beside), notes)
