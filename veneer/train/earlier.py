"""The adapters that a new one is kept apart from, and their data: read, checked, and what they read of each layer.

Legend: E experts of a layer, R rank, I in, K directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from veneer.adapter.card import Adapter, Card
from veneer.adapter.experts import numbered
from veneer.adapter.faults import add_fault
from veneer.adapter.verify import check_base
from veneer.config.orthogonal import OrthogonalToSettings
from veneer.data.chat import Template
from veneer.data.encode import encode
from veneer.data.preference import refuse_pairs
from veneer.data.sources import read_several, read_source
from veneer.errors import AdapterError, ConfigError, DataError, WrongBaseError, listed
from veneer.lowrank import directions
from veneer.methods.base import Method
from veneer.methods.experts import ExpertLoRA
from veneer.methods.lora import LoRA
from veneer.model import fingerprint as fingerprints
from veneer.train.orthogonal import Orthogonality, start_outside
from veneer.train.osrm import answered, strongest

ROWS = 256  # of an earlier adapter's data that make the start, and as many that judge it


class Data(NamedTuple):
    """The file of an earlier adapter's data; examples of it that make a start, and others that judge it."""

    file: str
    sha256: str
    fitted: Sequence[Any]
    held_out: Sequence[Any]


class Earlier(NamedTuple):
    """An adapter, the folder that it was named by, and its data where that was named."""

    folder: str
    adapter: Adapter
    data: Data | None = None

    def facts(self) -> dict[str, str]:
        named = {"folder": self.folder, "identity": self.adapter.identity}
        return {**named, "data": self.data.file, "data_sha256": self.data.sha256} if self.data else named


def read_earlier(settings: OrthogonalToSettings, tokenizer: Any) -> list[Earlier]:
    """The adapters that the settings name, and their data, read as they were trained, but by the base's tokenizer.

    Raises AdapterError with the faults of all adapters, DataError with those of all files.
    """
    found = _read_adapters(settings.orthogonal_to)
    if not settings.orthogonal_data:
        return found

    def read(one: tuple[Earlier, str]) -> Earlier:
        earlier, file = one
        return earlier._replace(data=_read_data(file, tokenizer, earlier.adapter.card))

    return read_several(zip(found, settings.orthogonal_data, strict=True), read, "--orthogonal-data:")


def _read_data(file: str, tokenizer: Any, card: Card) -> Data:
    """The first rows of a file; every other one makes the start. All of a row counts, questions and answers."""
    source = read_source(file, card.columns, limit=2 * ROWS)
    refuse_pairs(source.rows, file, "this start does not read", "leave --orthogonal-data out, or give plain rows")
    examples = encode(source.rows, Template(tokenizer, card.system_prompt), card.max_length, file).examples[: 2 * ROWS]
    if len(examples) < 2:
        raise DataError(
            f"{file} makes one row of {len(examples[0].input_ids):,} tokens; wanted two rows at least: one to start "
            "by, one to judge the start by"
        )
    return Data(file, source.sha256(), examples[::2], examples[1::2])


def _read_adapters(folders: Sequence[str]) -> list[Earlier]:
    faults: list[str] = []
    found: list[Earlier] = []
    for folder in folders:
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
    earlier: Sequence[Earlier],
    model: nn.Module,
    methods: Mapping[str, Method],
    settings: OrthogonalToSettings,
    progress: bool = False,
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
    about = {
        "adapters": [one.facts() for one in earlier],
        "layers": len(read),
        "layers_trained": len(trained),
        "lambda": settings.orthogonal_lambda,
        "start": settings.orthogonal_start,
    }
    apart = Orthogonality(trained, read, settings.orthogonal_lambda, about)
    room = _room(apart, trained)
    data = [one.data for one in earlier if one.data]
    others = strongest(model, [one.fitted for one in data], room, progress) if data else {}
    if data and not others:
        raise ConfigError(
            "--orthogonal-data: what the layers are fed that are trained here cannot be listened to (that of experts, "
            "embeddings and heads); leave it out"
        )
    if settings.orthogonal_start:
        for path, method in trained.items():  # also where no earlier adapter reads: their data comes by all the same
            start_outside(method, [spaces[path] for spaces in (apart.bases, others) if path in spaces])
        apart.share_at_start = apart.share()
    if data:
        apart.about["answered"] = answered(model, [one.held_out for one in data], trained)
    return apart


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


def _room(apart: Orthogonality, trained: Mapping[str, LoRA]) -> dict[str, int]:
    """Path -> the directions that are left beside those that are read and r. Raises ConfigError where too few are."""
    faults: list[str] = []
    full, room = {}, {}
    for path, method in trained.items():
        inputs, taken = method.a_RI.shape[-1], apart.taken(path) if path in apart.methods else 0
        room[path] = inputs - taken - method.rank
        if room[path] < 0:
            full[path] = f"{path} ({inputs} inputs, {taken} of them read, r {method.rank})"
    add_fault(faults, "the earlier adapters leave fewer directions than r", list(full.values()))
    if faults:
        next_step = "Next: a lower --r, fewer adapters, or those at a lower rank (veneer convert IN OUT --rank N)."
        raise ConfigError(listed("--orthogonal-to:", faults, next_step))
    return room
