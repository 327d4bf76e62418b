"""Results of the GPU comparison as text."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_process import Result, worked
from benchmarks.gpu_rows import LONGEST, ROWS


def page(held: dict[str, Any]) -> str:
    """All of a file as Markdown, each row under its title."""
    parts = [f"#### {ROWS[name].title}\n\n{table(name, held['rows'][name])}" for name in ROWS if measured(held, name)]
    for name, found in held.get("longest", {}).items():
        parts.append(f"#### {LONGEST[name].title}\n\n{longest_lines(found)}")
    return "\n\n".join([*parts, provenance(held)])


def measured(held: dict[str, Any], name: str) -> bool:
    """Whether the file holds a measured run of the row."""
    return any(map(worked, held.get("rows", {}).get(name, {}).get("systems", {}).values()))


def provenance(held: dict[str, Any]) -> str:
    """Which GPU, which versions, when."""
    entries = [made for row in held.get("rows", {}).values() for made in row["systems"].values() if worked(made)]
    versions = {f"{name} {version}" for made in entries for name, version in made["versions"].items()}
    gpus, days = {made["gpu"]["name"] for made in entries}, {made["date"] for made in entries}
    ceiling = held.get("ceiling", {})
    rates = ", ".join(
        f"{ceiling[f'{kind}_tflops']:.0f} TFLOP/s in {kind}" for kind in ("bf16", "fp8") if f"{kind}_tflops" in ceiling
    )
    most = f" The ceiling, measured by the same call: {rates}." if rates else ""
    return f"{' and '.join(sorted(gpus))}, {', '.join(sorted(days))}; {', '.join(sorted(versions))}.{most}"


def table(name: str, row: dict[str, Any]) -> str:
    """A row as Markdown. Start: from launching the process to its first step's end, with empty and with full caches."""
    lines = [
        f"| {name} | rows x passes | recompute | compiled | tokens/s | peak GiB | driver GiB | of ceiling | start s |",
        "| --- | --: | --- | --- | --: | --: | --: | --: | --: |",
    ]
    for system, made in row["systems"].items():
        if worked(made):
            lines.append(_line(system, made))
    compared = []
    for ours, peers in row["ratios"].items():
        for peer, ratio in peers.items():
            fast, small = ratio["tokens_per_second"]["median"], ratio["peak_gib"]["median"]
            compared.append(f"{ours} / {peer}: {fast:.3f} in tokens/s, {small:.3f} in peak memory")
    return "\n".join([*lines, "", "; ".join(compared)]) if compared else "\n".join(lines)


def _line(system: str, made: dict[str, Any]) -> str:
    v = made["variant"]
    starts = ", ".join(f"{made[f'{k}_start_seconds']:.0f}" for k in ("cold", "warm") if f"{k}_start_seconds" in made)
    cells = [
        *(system, f"{v['batch'] // v['passes']} x {v['passes']}", v["recompute"], "yes" if v["compile"] else "no"),
        *(f"{made['tokens_per_second']:,.0f}", f"{made['peak_gib']:.2f}", f"{made['driver_gib']:.2f}"),
        *(f"{100 * made['share_of_ceiling']:.1f} %" if "share_of_ceiling" in made else "", starts),
    ]
    return "| " + " | ".join(cells) + " |"


def longest_lines(found: dict[str, Any]) -> str:
    """What was predicted under each limit, and what trained."""
    return "\n".join(
        f"- {cap} GiB: {made['predicted']:,} tokens predicted, {made['sequence']:,} trained ({outcome(made).strip()})"
        for cap, made in found.get("limits", {}).items()
    )


def outcome(made: Result) -> str:
    """One line on a result."""
    if worked(made):
        return (
            f"{made['tokens_per_second']:8.0f} tokens/s  {made['peak_gib']:6.2f} GiB (driver {made['driver_gib']:.2f}) "
            f"first step {made.get('first_step_seconds', 0):.1f} s  loss {made['losses'][0]:.4f}"
        )
    return f"out of memory: {made['oom'][:120]}" if "oom" in made else f"failed: {made.get('failed', '')[:400]}"
