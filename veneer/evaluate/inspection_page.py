"""The page of `veneer inspect`: tables and heat maps of adapters, alone and beside each other, in one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from veneer.evaluate import plots
from veneer.evaluate.matrix import matrix
from veneer.evaluate.on_data import OnFile
from veneer.evaluate.on_data_page import on_data_sections
from veneer.evaluate.page import PAGE, STYLE, number, table, text
from veneer.evaluate.report import both, details, notes_list, write_page
from veneer.measure.inspection import FEW, Inspected, Inspection, kinds_beside_base
from veneer.measure.pairs import Pair
from veneer.measure.together import ALIGNMENT

# Title, measure, the chance level to take off, the size that is full, what it says.
_MATRICES = (
    ("Direction", "cosine", None, 1.0, "Cosine of the updates, all layers as one vector: 1 the same, 0 unrelated."),
    (
        "Shared outputs",
        "output",
        "output_chance",
        1.0,
        "Part of the space they write to that they share, less what random spaces of these ranks share.",
    ),
    ("Shared inputs", "input", "input_chance", 1.0, "The same of the spaces they read from."),
    (
        "Sign conflict",
        "sign_conflict_weighted",
        None,
        0.5,
        "Share of entries with other signs, weighted by size, less the half of chance: 0.5 would be opposite updates.",
    ),
    (
        "Interference",
        "interference_share",
        None,
        1.0,
        "Singular task interference (arXiv 2412.00081) over the sum of singular values: 1 an adapter and itself.",
    ),
)
_EXTREMES = {
    "closest": "The closest pairs",
    "conflicting": "The most conflicting pairs",
    "interfering": "The pairs that interfere most",
}


def write_inspection(path: str | Path, found: Inspection, data: Sequence[OnFile] = ()) -> None:
    """Write the page at `path`, atomically. The same inspection gives the same bytes.

    data: the adapters on each other's data, if that was measured.
    """
    few = len(found.adapters) <= FEW
    sections = [notes_list(found.notes)]
    sections += [_verdict(one) for one in found.adapters if one.verdict]
    sections += [_adapter(one, found.rank) for one in found.adapters] if few else [_adapters(found)]
    sections += _pairs(found) if few else _extremes(found)
    sections.append(_together(found))
    sections += on_data_sections(data, [one.name for one in found.adapters])
    names = ", ".join(text(one.name) for one in found.adapters) if few else f"{len(found.adapters)} adapters"
    page = PAGE.format(title="Inspection", style=STYLE, subtitle=f"<b>{names}</b>", body="\n".join(sections))
    write_page(Path(path), page)


def _verdict(one: Inspected) -> str:
    assert one.verdict is not None
    verdict = one.verdict
    says = "loads it" if verdict.loads else "does not load it as it is"
    lines = "".join(f"<li>{text(line)}</li>" for line in (*verdict.faults, *verdict.notes))
    return (
        f'<section><h2>{text(one.name)}: {text(verdict.server)} <span class="{"yes" if verdict.loads else "no"}">{says}'
        f'</span></h2><p class="small">Rules of version {text(verdict.version)}.</p><ul>{lines}</ul></section>'
    )


def _adapter(one: Inspected, rank: int) -> str:
    card = {**one.card(), "fits the base": "yes" if one.base and not one.base.notes else None}
    told = details("Card", {key: value for key, value in card.items() if value not in (None, [], {}, "")})
    figures = drawing = ""
    if one.whole is not None:
        beside = kinds_beside_base(one)
        heads = ["", "layers", "rank", "norm", "effective rank", "first", "90 %", "99 %", f"kept at {rank}"]
        rows = [
            [
                kind,
                str(each.layers),
                str(each.rank_to) if each.rank_from == each.rank_to else f"{each.rank_from}–{each.rank_to}",
                *map(number, (each.norm, each.effective_rank, each.first, each.directions_90, each.directions_99)),
                number(each.kept),
                *(map(number, beside.get(kind, (None, None, None))) if beside else ()),
            ]
            for kind, each in {**one.kinds, "all": one.whole}.items()
        ]
        figures = table([*heads, *(["ΔW/W", "largest", "intruders"] if beside else [])], rows)
        drawing = _where(one)
    return f"<section><h2>{text(one.name)}</h2>{figures}{drawing}</section>{told}"


def _where(one: Inspected) -> str:
    """By module and layer: ‖ΔW‖ / ‖W‖ where there is a base, else each layer's part of the whole norm."""
    assert one.whole is not None
    if one.base is not None:
        values, says = one.base.ratios, "Size of each update beside its weight, ‖ΔW‖ / ‖W‖."
    else:
        whole = one.whole.norm or 1.0
        values = {module: found.norm / whole for module, found in one.updates.items()}
        says = "Norm of each update beside that of all together; beside the weights with --base-model."
    grid = plots.grid(values)
    if not grid.values:
        return ""
    top = 100 * max(grid.values.values())
    drawing = both(plots.heat_map(grid, plots.WIDE), plots.heat_map(grid, plots.NARROW))
    scale = f'<p class="scale"><span>0</span><i></i><span>{top:.2g} %</span></p>'
    return f'{drawing}{scale}<p class="small">{says}</p>'


def _adapters(found: Inspection) -> str:
    rows = []
    for one in found.adapters:
        whole = one.whole
        figures = (
            (whole.layers, whole.rank_to, whole.norm, whole.effective_rank, whole.kept) if whole else (0, 0, 0, 0, 1)
        )
        rows.append([one.name, "verified" if one.has_card else "none", *map(number, figures)])
    heads = ["", "card", "layers", "rank", "norm", "effective rank", f"kept at {found.rank}"]
    return f"<section><h2>{len(rows)} adapters</h2>{table(heads, rows)}</section>"


def _pairs(found: Inspection) -> list[str]:
    if not found.pairs:
        return []
    names = [one.name for one in found.adapters]
    sections = []
    for title, measure, chance, top, says in _MATRICES:
        values = {(pair.first, pair.second): _less(pair, measure, chance) for pair in found.pairs}
        drawing = matrix(names, values, title, top)
        sections.append(
            f'<section><h2>{title}</h2><figure>{drawing}</figure><p class="small">{text(says)}</p></section>'
        )
    return sections


def _less(pair: Pair, measure: str, chance: str | None) -> float | None:
    value, off = getattr(pair, measure), getattr(pair, chance) if chance else 0.0
    return None if value is None else value - off


def _extremes(found: Inspection) -> list[str]:
    heads = ["", "", "cosine", "shared outputs", "shared inputs", "sign conflict", "interference"]
    measures = ("cosine", "output", "input", "sign_conflict_weighted", "interference_share")
    names = [one.name for one in found.adapters]
    sections = []
    for kind, those in found.extremes().items():
        rows = [[names[p.first], names[p.second], *(number(asdict(p)[m]) for m in measures)] for p in those]
        sections.append(f"<section><h2>{_EXTREMES[kind]}</h2>{table(heads, rows)}</section>")
    return sections


def _together(found: Inspection) -> str:
    if found.together is None:
        return ""
    sum_of_all = found.together
    aligned = zip(found.adapters, sum_of_all.alignment, strict=True)
    rows = [[one.name, number(ratio)] for one, ratio in aligned]
    return (
        f"<section><h2>Sum of all</h2><p>At rank {found.rank} the sum of all updates keeps "
        f"{100 * sum_of_all.kept:.1f} % of its squared norm.</p>{table(['', 'alignment'], rows)}"
        f'<p class="small">Alignment: {text(ALIGNMENT)} (arXiv 2502.04959), mean over layers.</p></section>'
    )
