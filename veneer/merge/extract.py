"""The adapter nearest to what a tuned model changed in its base: an SVD of the difference of every linear layer.

One layer of both models is in memory at a time. What lies elsewhere (norms, embeddings, biases, the vocabulary head) no
adapter on linear layers holds: it is measured, and losing it is an error unless it is asked for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.adapter.card import Adapter, Card
from veneer.config import ConvertSettings
from veneer.errors import ModelError, listed
from veneer.lowrank import Nearest, nearest
from veneer.merge.apply import LayerReport
from veneer.merge.changes import Change, changes, distance
from veneer.merge.checkpoints import Pair, open_pair
from veneer.merge.folder import free, whole
from veneer.merge.summary import by_kind, share_kept
from veneer.model import fingerprint as fingerprints
from veneer.model.progress import shown
from veneer.model.read import quiet, read_tokenizer
from veneer.model.source import resolve
from veneer.model.sources import checkpoint_files


@dataclass(frozen=True)
class ExtractReport:
    """What of the difference the adapter holds.

    kept: share of the squared Frobenius norm of the difference, over all linear layers. error: norm of what was left
    out over that of the difference. lost: what changed elsewhere.
    """

    identity: str
    parameters: int
    kept: float
    error: float
    worst_layer: str
    worst_kept: float
    layers: dict[str, LayerReport]
    lost: dict[str, Change]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "kinds": by_kind(self.layers)}


def extract_folder(settings: ConvertSettings, progress: bool = True) -> ExtractReport:
    """Writes the adapter to `settings.output`, whole or not at all. Raises ConfigError where the output is in the way,
    and what `extracted` raises."""
    output = free(settings.output)
    base, tuned = str(settings.base_model), str(settings.extract)
    adapter, report = extracted(base, tuned, settings.rank, settings.energy, settings.force, progress)
    with whole(output) as partial:
        adapter.save(partial)
    return report


def extracted(
    base: str,
    tuned: str,
    rank: int | None = None,
    energy: float | None = None,
    force: bool = False,
    progress: bool = True,
) -> tuple[Adapter, ExtractReport]:
    """The adapter whose layers are the nearest (Eckart-Young) to tuned - base, of at most `rank` directions, or of the
    fewest that keep a share `energy` of the squared norm of each. Layers that did not change have none.

    force: extract although something else changed as well. Raises ModelError: see `open_pair`; where something else
    changed; where nothing did; for values that are not finite.
    """
    pair = open_pair(base, tuned)
    tokenizers = _tokenizers(pair)
    lost = changes(pair, pair.others, progress)
    notes = _losses(lost, tokenizers)
    if notes and not force:
        advice = "Next: --force extracts the rest all the same; or keep the tuned model as it is."
        raise ModelError(listed(f"{tuned} changed what no adapter on linear layers holds:", notes, advice))
    found = _layers(pair, rank, energy, progress)
    layers = {path: _told(one) for path, one in found.items()}
    adapter = _adapter(pair, base, tokenizers, found, {"extract": {"rank": rank, "energy": energy, "from": tuned}})
    kept, worst = share_kept(layers), min(layers, key=lambda path: layers[path].kept)
    return adapter, ExtractReport(
        identity=adapter.identity,
        parameters=sum(tensor.numel() for tensor in adapter.tensors.values()),
        kept=kept,
        error=max(0.0, 1 - kept) ** 0.5,
        worst_layer=worst,
        worst_kept=layers[worst].kept,
        layers=layers,
        lost=lost,
        notes=(*(f"lost: {note}" for note in notes), *_rounding_note(pair)),
    )


def _losses(lost: dict[str, Change], tokenizers: tuple[Any, Any]) -> list[str]:
    told = [
        f"{kind}: {one.changed} of {one.count} changed, by {one.relative:.2g} of their norm"
        for kind, one in lost.items()
    ]
    ids = [fingerprints.tokenizer_of(tokenizer) for tokenizer in tokenizers]
    return told + ["tokenizer: the tuned model's makes other token ids than the base's"] * (ids[0] != ids[1])


def _rounding_note(pair: Pair) -> list[str]:
    base, tuned = pair.read(f"{pair.linear[0]}.weight")
    if torch.finfo(tuned.dtype).eps <= torch.finfo(base.dtype).eps:
        return []
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in (base, tuned)]
    told = f"the base is stored in {dtypes[0]}, the tuned model in {dtypes[1]}"
    return [f"{told}: its rounding of all weights is part of the difference, and what is left out is mostly that"]


def _tokenizers(pair: Pair) -> tuple[Any, Any]:
    """Of base and tuned model; the base's twice where the tuned model comes without one."""
    with quiet():
        base = read_tokenizer(pair.base.source)
        try:
            return base, read_tokenizer(pair.tuned.source)
        except ModelError:
            return base, base


def _layers(pair: Pair, rank: int | None, energy: float | None, progress: bool) -> dict[str, Nearest]:
    """Path -> factors, in the model's order."""
    by_file = sorted(pair.linear, key=lambda path: str(pair.base.shards.file_of[pair.names[f"{path}.weight"][0]]))
    found: dict[str, Nearest] = {}
    faults = []
    for path in shown(by_file, "extracting", progress):
        base, tuned = pair.read(f"{path}.weight")
        if distance(base, tuned) == 0:
            continue
        try:
            found[path] = nearest(_difference(pair, base, tuned), rank, energy)
        except ValueError as error:
            faults.append(f"{path}: {error}")
    if faults:
        raise ModelError(listed("These layers cannot be extracted:", faults, "Nothing was made."))
    if not found:
        names = f"{pair.tuned.source.name} and {pair.base.source.name}"
        raise ModelError(f"{names} are the same in every linear layer: there is nothing to extract")
    return {path: found[path] for path in pair.linear if path in found}


def _difference(pair: Pair, base: Tensor, tuned: Tensor) -> Tensor:
    difference = tuned.float() - base.float()
    return difference.mT if pair.transposed else difference


def _told(found: Nearest) -> LayerReport:
    norm = max(0.0, found.whole**2 - found.error**2) ** 0.5
    return LayerReport(len(found.a), norm, found.kept, found.error)


def _adapter(
    pair: Pair, base: str, tokenizers: tuple[Any, Any], found: dict[str, Nearest], training: dict[str, Any]
) -> Adapter:
    """On the base, with the chat template of the tuned model."""
    source = resolve(base)
    template = getattr(tokenizers[1], "chat_template", None)
    fingerprint = fingerprints.Fingerprint(
        weights=fingerprints.weights_of(checkpoint_files(str(source.local or source.place))),
        architecture=fingerprints.architecture_of(pair.base.config),
        tokenizer=fingerprints.tokenizer_of(tokenizers[0]),
        template=fingerprints.template_of(tokenizers[1]),
    )
    card = Card(
        method="lora",
        settings={"fan_in_fan_out": True} if pair.transposed else {},
        scales=dict.fromkeys(found, 1.0),
        ranks={path: len(one.a) for path, one in found.items()},
        base=fingerprint,
        base_name=base,
        template_text=template if isinstance(template, str) else None,
        training=training,
    )
    named = {f"{path}.a": one.a for path, one in found.items()} | {f"{path}.b": one.b for path, one in found.items()}
    return Adapter(named, card)
