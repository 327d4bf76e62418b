"""`veneer inspect`: adapters measured, alone and beside each other; would a server load them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from veneer.cli.on_data import print_on_data
from veneer.cli.output import print_facts, print_json, print_table, say
from veneer.cli.parse import Command, parse
from veneer.config import InspectSettings

if TYPE_CHECKING:
    from veneer.evaluate.on_data import OnFile
    from veneer.measure.inspection import Inspected, Inspection
    from veneer.measure.pairs import Pair

COMMAND = Command(
    name="inspect",
    summary="adapters measured, alone, on their base and beside each other; would a server load them",
    settings=InspectSettings,
    positional="adapters",
    example="veneer inspect out/skill --base-model smollm2 --target vllm",
)
_PAIR = ("norm_ratio", "cosine", "output", "input", "sign_conflict_weighted", "interference_share")
_HEADS = ("norms", "cosine", "outputs", "inputs", "signs", "interf.")
_LEGEND = (
    "norms: of the first over the second; outputs, inputs: shared part of the spaces / by chance; signs: conflict, "
    "weighted, above chance; interf.: singular task interference, 1 for an adapter beside itself"
)
_ALONE = (
    "eff. rank: directions, as the entropy of the spectrum counts them; first: share of the squared norm in the first; "
    "90 %, 99 %: directions that hold so much; kept: share that a cut to that rank leaves"
)
_NEXT = (
    "next: none of this foretells what a merge keeps of what they can do; --base-model MODEL --dataset FILE FILE does, "
    "and merge --method lora_soups --dataset kept more where it was measured (docs/merging.md)"
)
_EXTREMES = {
    "closest": "the closest pairs (cosine)",
    "conflicting": "the most conflicting pairs (weighted signs)",
    "interfering": "the pairs that interfere most",
}


def run(argv: Sequence[str]) -> int:
    """Measure and print; 2 where the target would not load an adapter."""
    parsed = parse(argv, COMMAND)
    settings = parsed.settings
    from veneer.measure.inspection import inspect

    rows = _rows(settings)
    loaded = _loaded(settings)
    found = inspect(settings.adapters, loaded and loaded.model, settings.target, settings.rank)
    data = _on_data(settings, found, loaded, rows) if rows else ()
    result = found.to_json() | _data_json(data, _names(found))
    if settings.output is not None:
        from veneer.evaluate.inspection_page import write_inspection

        write_inspection(settings.output, found, data)
        say(f"written: {settings.output}")
    _print(found, parsed.json, data)
    if parsed.json:
        print_json(result)
    return 0 if found.loads else 2


def _rows(settings: InspectSettings) -> list[Any]:
    """Of each data file: before a model is loaded, which takes longer than to find one missing."""
    if not settings.dataset:
        return []
    from veneer.evaluate.on_data import read_files

    return read_files(settings.dataset, settings.columns, settings.limit)


def _on_data(settings: InspectSettings, found: Inspection, loaded: Any, rows: list[Any]) -> tuple[OnFile, ...]:
    from veneer.evaluate.on_data import on_data

    adapters = [one.adapter for one in found.adapters]
    return on_data(loaded, adapters, _names(found), settings.dataset, rows, settings.seed, settings.max_length, say)


def _data_json(data: Sequence[OnFile], names: Sequence[str]) -> dict[str, Any]:
    if not data:
        return {}
    from veneer.evaluate.foretold import foretold

    told, _ = foretold(data, names)
    return {"data": [one.to_json(names) for one in data], "foretold": [one.to_json(names) for one in told]}


def _names(found: Inspection) -> list[str]:
    return [one.name for one in found.adapters]


def _loaded(settings: InspectSettings) -> Any:
    """The base in float32, whose weights are those of the checkpoint, unless another dtype was asked for."""
    if settings.base_model is None:
        return None
    from veneer.model.load import load

    dtype = "float32" if settings.dtype == "auto" else settings.dtype
    return load(settings.base_model, dtype, storage=settings.storage)


def _print(found: Inspection, json: bool, data: Sequence[OnFile]) -> None:
    from veneer.measure.inspection import FEW
    from veneer.measure.together import ALIGNMENT

    if len(found.adapters) <= FEW:
        for one in found.adapters:
            _print_adapter(one, found.rank, json)
        say(_ALONE)
    else:
        _print_adapters(found, json)
    _print_pairs(found, json)
    if found.together is not None:
        print_facts("sum of all", _together(found), json=json)
        say(f"alignment: {ALIGNMENT}")
    if data:
        print_on_data(data, _names(found), json)
    elif found.pairs:
        say(_NEXT)
    for note in found.notes:
        say(f"note: {note}")
    for one in found.adapters:
        _print_verdict(one)


def _print_adapter(one: Inspected, rank: int, json: bool) -> None:
    from veneer.measure.inspection import kinds_beside_base

    card = one.card()
    fingerprint = card.pop("fingerprint") or {}
    facts = {name: value for name, value in card.items() if value not in (None, "", [], {})}
    facts |= {f"base {part}": value[:12] for part, value in fingerprint.items()}
    if one.base is not None:
        facts["fits the base"] = "yes" if not one.base.notes else "as far as known"
    print_facts(one.folder, facts, json=json)
    if one.whole is None:
        return
    columns = ["layers", "n", "rank", "norm", "eff. rank", "first", "90 %", "99 %", f"kept at {rank}"]
    rows = [
        [
            kind,
            each.layers,
            str(each.rank_to) if each.rank_from == each.rank_to else f"{each.rank_from}-{each.rank_to}",
            *(each.norm, each.effective_rank, each.first, each.directions_90, each.directions_99, each.kept),
        ]
        for kind, each in {**one.kinds, "all": one.whole}.items()
    ]
    print_table(f"{one.name}: updates by kind of layer", columns, rows, json=json)
    if beside := kinds_beside_base(one):
        heads = ["layers", "median ΔW/W", "largest", "intruders"]
        print_table(f"{one.name} beside its base", heads, [[kind, *told] for kind, told in beside.items()], json=json)


def _print_adapters(found: Inspection, json: bool) -> None:
    columns = ["adapter", "card", "layers", "rank", "norm", "effective rank", f"kept at {found.rank}"]
    rows = [
        [one.name, "verified" if one.has_card else "none"]
        + (
            [one.whole.layers, one.whole.rank_to, one.whole.norm, one.whole.effective_rank, one.whole.kept]
            if one.whole
            else [0] * 5
        )
        for one in found.adapters
    ]
    print_table(f"{len(found.adapters)} adapters", columns, rows, json=json)


def _print_pairs(found: Inspection, json: bool) -> None:
    from veneer.measure.inspection import FEW

    if len(found.adapters) > FEW:
        for kind, those in found.extremes().items():
            _print_pair_table(_EXTREMES[kind], found, those, json)
    elif found.pairs:
        _print_pair_table("pairs", found, found.pairs, json)
    if found.pairs:
        say(_LEGEND)


def _print_pair_table(title: str, found: Inspection, those: Sequence[Pair], json: bool) -> None:
    names = [one.name for one in found.adapters]
    rows = [
        [f"{names[pair.first]} : {names[pair.second]}", *(_cell(pair, measure) for measure in _PAIR)] for pair in those
    ]
    print_table(title, ["pair", *_HEADS], rows, json=json)


def _cell(pair: Pair, measure: str) -> str:
    value, chance = getattr(pair, measure), getattr(pair, f"{measure}_chance", None)
    if value is None:
        return "-"
    return f"{value:.3f}" if chance is None else f"{value:.2f} / {chance:.2f}"


def _together(found: Inspection) -> dict[str, Any]:
    assert found.together is not None
    worst = min(found.together.kept_by_layer, key=found.together.kept_by_layer.__getitem__, default=None)
    told = {f"kept at rank {found.rank}": found.together.kept, "of the layer that keeps least": worst}
    aligned = {one.name: ratio for one, ratio in zip(found.adapters, found.together.alignment, strict=True)}
    few = dict(sorted(aligned.items(), key=lambda item: item[1] if item[1] is not None else 2.0)[:10])
    return {**told, "alignment" if len(few) == len(aligned) else "alignment, the lowest": few}


def _print_verdict(one: Inspected) -> None:
    if one.verdict is None:
        return
    verdict = one.verdict
    say(
        f"{one.folder}: {verdict.server} {verdict.version} "
        f"{'loads it' if verdict.loads else 'does not load it as it is'}"
    )
    for fault in verdict.faults:
        say(f"  - {fault}")
    for note in verdict.notes:
        say(f"  note: {note}")
