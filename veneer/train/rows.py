"""From the data files that a run names to examples: to train on, and kept back to check it."""

from __future__ import annotations

import dataclasses
from typing import Any

from veneer.config import RunConfig
from veneer.data.batches import split
from veneer.data.chat import EncodedRows, Example, Template, encode_rows
from veneer.data.files import read_rows


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Examples to train on and to validate on, and what was said about them."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    notes: tuple[str, ...]

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
    """Rows of the data file as examples, split; DataError where nothing is left to train on."""
    template = Template(tokenizer, config.data.system_prompt)
    encoded = _encode(config.data.dataset, template, config)
    notes = list(encoded.notes)
    if config.data.eval_dataset is not None:
        validation = _encode(config.data.eval_dataset, template, config)
        return TrainingData(encoded.examples, validation.examples, tuple(notes + list(validation.notes)))
    share = config.data.validation_split
    if isinstance(share, float) and share * len(encoded.examples) < 2:
        notes += [f"no validation rows: {share:g} of {len(encoded.examples)} rows is less than two"] if share else []
        return TrainingData(encoded.examples, (), tuple(notes))
    prompts = [_prompt(example) for example in encoded.examples]
    train_rows, validation_rows = split(len(prompts), share, config.train.seed, prompts)
    pick = encoded.examples.__getitem__
    return TrainingData(tuple(map(pick, train_rows)), tuple(map(pick, validation_rows)), tuple(notes))


def _encode(path: str, template: Template, config: RunConfig) -> EncodedRows:
    return encode_rows(read_rows(path), template, config.data.max_length, path)


def _prompt(example: Example) -> tuple[int, ...]:
    """What stands before the first trained token: rows that share it stay on one side of the split."""
    return example.input_ids[: example.targets.index(True)]
