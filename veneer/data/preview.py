"""What the model will see: the encoded rows with their trained tokens marked, and the counts that matter."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from veneer.data.examples import EncodedRows, Example

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

PERCENTILES = (0, 50, 95, 100)
TRAINED, CONTEXT = "bold green", "dim"
OPEN, CLOSE = "⟦", "⟧"  # the marks hold without colours, too


def summary(encoded: EncodedRows) -> dict[str, Any]:
    """Counts over all examples, plain numbers: rows, tokens, trained tokens, truncation, percentiles of lengths."""
    lengths = [len(example.input_ids) for example in encoded.examples]
    trained = [sum(example.targets) for example in encoded.examples]
    return {
        "rows": len(lengths),
        "tokens": sum(lengths),
        "trained_tokens": sum(trained),
        "truncated_rows": sum(example.dropped > 0 for example in encoded.examples),
        "dropped_tokens": encoded.dropped_tokens,
        "rows_without_targets": len(encoded.rows_without_targets),
        "length": _percentiles(lengths),
        "trained_length": _percentiles(trained),
        "notes": list(encoded.notes),
    }


def preview(encoded: EncodedRows, tokenizer: Any, n: int) -> RenderableType:
    """The first `n` examples as text, trained tokens bright and between brackets, then the counts and the notes."""
    from rich.console import Group
    from rich.text import Text

    legend = Text.assemble(("trained on", TRAINED), f" {OPEN}so{CLOSE}, ", ("only seen", CONTEXT), ", ↵ line break")
    first = enumerate(encoded.examples[:n])
    shown = [
        part for i, example in first for part in (_heading(encoded.label(i), example), _marked(example, tokenizer), "")
    ]
    notes = [Text(f"note: {note}", style="yellow") for note in encoded.notes]
    return Group(legend, "", *shown, _table(summary(encoded)), *notes)


def runs(example: Example, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """The example's text cut where the mask changes: (text, trained on). Joined, it is the decoded whole."""
    end, before = 0, ""
    for trained, group in groupby(example.targets):
        end += len(list(group))
        # decoding ever longer prefixes: a run decoded alone may lose its leading space
        text = tokenizer.decode(example.input_ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield text[len(before) :], trained
        before = text


def _marked(example: Example, tokenizer: Any) -> Text:
    from rich.text import Text

    text = Text()
    for run, trained in runs(example, tokenizer):
        visible = _visible(run)
        text.append(f"{OPEN}{visible}{CLOSE}" if trained else visible, style=TRAINED if trained else CONTEXT)
    return text


def _visible(text: str) -> str:
    """Control characters as pictures: data must not be able to steer the terminal."""
    pictures = {code: chr(0x2400 + code) for code in range(32)} | {127: "␡", 10: "↵\n"}
    return text.translate(pictures | dict.fromkeys(range(128, 160), "�"))


def _heading(label: str, example: Example) -> Text:
    from rich.text import Text

    cut = f", {example.dropped:,} cut off" if example.dropped else ""
    counts = f"{len(example.input_ids):,} tokens, {sum(example.targets):,} trained on{cut}"
    return Text(f"{label}: {counts}", style="bold")


def _table(counts: dict[str, Any]) -> RenderableType:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    share = counts["trained_tokens"] / max(1, counts["tokens"])
    table.add_row("rows", f"{counts['rows']:,}")
    table.add_row("tokens", f"{counts['tokens']:,}")
    table.add_row("trained on", f"{counts['trained_tokens']:,} ({share:.1%})")
    table.add_row("cut at max_length", f"{counts['truncated_rows']:,} rows, {counts['dropped_tokens']:,} tokens")
    table.add_row("left out", f"{counts['rows_without_targets']:,} rows")
    for label, name in (("tokens a row", "length"), ("trained a row", "trained_length")):
        values = counts[name]
        table.add_row(label, f"median {values['p50']}, 95 % up to {values['p95']}, {values['p0']} to {values['p100']}")
    return table


def _percentiles(values: list[int]) -> dict[str, int]:
    """Values that occur (no interpolation), by percentile; 0 is the smallest, 100 the largest."""
    found = np.percentile(values or [0], PERCENTILES, method="higher").tolist()
    return {f"p{percent}": int(value) for percent, value in zip(PERCENTILES, found, strict=True)}
