"""From the data sets that a run names to examples: to train on, and kept back to check it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from veneer.config import DataSettings, RunConfig
from veneer.data.batches import split
from veneer.data.chat import Template
from veneer.data.encode import encode, family_of
from veneer.data.examples import EncodedRows, Unit
from veneer.data.mixture import epoch, shares
from veneer.data.preference import chosen_alone
from veneer.data.sources import Source, read_source
from veneer.data.text import EncodedText
from veneer.errors import DataError


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Examples to train on and to validate on, and what was said about them. `train` is an epoch: where data sets are
    mixed in shares, it has some examples several times."""

    train: tuple[Unit, ...]
    validation: tuple[Unit, ...]
    notes: tuple[str, ...]
    sha256: str | list[str]  # of the data set, or of each
    eval_sha256: str | None = None

    def facts(self) -> dict[str, int]:
        tokens = sum(len(example.input_ids) for example in self.train)
        trained = sum(sum(example.targets) for example in self.train)
        return {
            "rows": len(self.train),
            "validation_rows": len(self.validation),
            "tokens": tokens,
            "trained_tokens": trained,
        }


def read_data(config: RunConfig, tokenizer: Any) -> TrainingData:
    """Rows of the data sets as examples, split; DataError where nothing is left to train on."""
    data, seed = config.data, config.train.seed
    template = Template(tokenizer, data.system_prompt)
    sources = [read_source(name, data.columns, limit) for name, limit in zip(data.datasets, data.limits, strict=True)]
    parts = [_encoded(source, template, data, config.train.loss) for source in sources]
    hashes = [source.sha256() for source in sources]
    sha256 = hashes[0] if len(hashes) == 1 else hashes
    several = len(parts) > 1 or data.eval_dataset is not None
    notes = _told(sources, parts, template, several)
    if data.eval_dataset is None:
        train, validation = _split(parts, data.validation_split, seed, notes)
        return TrainingData(_mixed(train, data, notes, seed), validation, tuple(notes), sha256)
    source = read_source(data.eval_dataset, data.columns)
    held = _encoded(source, template, data, config.train.loss)
    train, _ = _split(parts, 0, seed, notes)
    notes += [note for note in _told([source], [held], template, several) if note not in notes]
    notes += _seen_again(parts, held)
    return TrainingData(
        _mixed(train, data, notes, seed), held.pick(range(len(held.groups()))), tuple(notes), sha256, source.sha256()
    )


def _told(sources: Sequence[Source], parts: Sequence[EncodedRows], template: Template, several: bool) -> list[str]:
    """The notes of each data set, after its name where there are several."""
    told = [(source.name, note) for source, part in zip(sources, parts, strict=True) for note in part.notes]
    named = [f"{name}: {note}" if several and note not in template.notes else note for name, note in told]
    return list(dict.fromkeys(named))


def _encoded(source: Source, template: Template, data: DataSettings, loss: str) -> EncodedRows:
    pairs = family_of(source.rows) == "preference"
    if loss == "dpo" and not pairs:
        raise DataError(f"{source.name} holds no preference pairs: --loss dpo needs columns `chosen` and `rejected`.")
    if pairs and loss != "dpo":
        raise DataError(
            f"{source.name} holds preference pairs, `chosen` and `rejected`: they need a preference loss, --loss dpo. "
            f"To train on the chosen answers alone: {chosen_alone(source.rows[0])}."
        )
    return encode(source.rows, template, data.max_length, source.name)


def _split(
    parts: Sequence[EncodedRows], share: float | int, seed: int, notes: list[str]
) -> tuple[list[tuple[Unit, ...]], tuple[Unit, ...]]:
    """Examples to train on of each data set, and those kept back of all: units of one group on one side, whatever
    data set they are of."""
    each = [part.groups() for part in parts]
    groups, ends = [group for one in each for group in one], list(accumulate(map(len, each)))
    if isinstance(share, float) and share * len(groups) < 2:
        notes += [f"no validation rows: {share:g} of {len(groups)} rows is less than two"] if share else []
        share = 0
    train_units, held_units = split(len(groups), share, seed, groups)
    train, validation = [], []
    for part, start, end in zip(parts, [0, *ends], ends, strict=False):
        mine, kept = ([unit - start for unit in units if start <= unit < end] for units in (train_units, held_units))
        train.append(part.pick(mine))
        validation.append(part.pick(kept))
        if isinstance(part, EncodedText) and kept:
            notes.append(
                f"documents are kept whole: {len(mine):,} of them, {len(train[-1]):,} chunks, are trained on, "
                f"{len(kept):,}, {len(validation[-1]):,} chunks, kept back for validation"
            )
    return train, tuple(example for part in validation for example in part)


def _mixed(train: Sequence[tuple[Unit, ...]], data: DataSettings, notes: list[str], seed: int) -> tuple[Unit, ...]:
    """One epoch of all data sets; how much of it each is, is added to `notes`."""
    if len(train) == 1:
        return train[0]
    if empty := [name for name, part in zip(data.datasets, train, strict=True) if not part]:
        raise DataError(f"of {', '.join(empty)} nothing is left to train on: all of it was kept back for validation")
    sizes = [len(part) for part in train]
    weights = data.dataset_weights or sizes
    rows = epoch(sizes, weights, seed)
    notes += [
        f"{name}: {size:,} rows to train on, {share:.1%} of an epoch, each {len(mine) / size:.4g} times"
        for name, size, share, mine in zip(data.datasets, sizes, shares(weights), rows, strict=True)
    ]
    return tuple(part[row] for part, mine in zip(train, rows, strict=True) for row in mine)


def _seen_again(parts: Sequence[EncodedRows], held: EncodedRows) -> list[str]:
    """What of a validation file is trained on as well."""
    trained, groups = {group for part in parts for group in part.groups()}, held.groups()
    count = sum(group in trained for group in groups)
    what = "are texts that are" if isinstance(held, EncodedText) else "have a prompt that is"
    return [f"{count:,} of {len(groups):,} validation rows {what} trained on too"] if count else []
