"""The frame of the report page: shell, style sheet, tables, and how text gets in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def text(value: Any) -> str:
    """Escaped; control characters, which could hide text, become visible."""
    shown = (chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in str(value))
    return escape("".join(shown))


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{title}</h1><p>{subtitle}</p></header>
{body}
<footer>Written by veneer. This page is one file and loads nothing.</footer>
</main>
</body>
</html>
"""

STYLE = """
:root { --ground: #faf9f6; --paper: #ffffff; --ink: #1d1c1a; --muted: #6d6861; --line: #e5e1d9;
  --accent: #14696b; --second: #b65a2a; --good: #2c7548; --bad: #b03a2e; --mark: #f6dcd3; }
@media (prefers-color-scheme: dark) { :root { --ground: #141413; --paper: #1c1c1a; --ink: #e9e7e2; --muted: #9b968d;
  --line: #32312e; --accent: #63c1bd; --second: #e39a6c; --good: #7fc898; --bad: #ee8f83; --mark: #5a3128; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.5; -webkit-text-size-adjust: 100%;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 768px; margin: 0 auto; padding: 48px 24px 64px; }
h1, h2, .figure strong { font-family: Charter, "Iowan Old Style", "Palatino Linotype", Georgia, serif; }
h1 { font-size: 32px; font-weight: 600; line-height: 1.15; letter-spacing: -.01em;
  margin: 0 0 8px; text-wrap: balance; }
h2 { font-size: 20px; font-weight: 600; margin: 0 0 12px; }
header p, .small, footer { color: var(--muted); }
header p { margin: 0; overflow-wrap: anywhere; } header b { font-weight: 500; color: var(--ink); }
section { margin-top: 48px; } small, .small { font-size: 13px; } footer { margin-top: 64px; font-size: 12px; }
.small { margin: 12px 0 0; max-width: 62ch; overflow-wrap: anywhere; }
.notes { margin: 24px 0 0; padding: 12px 16px 12px 32px; background: var(--paper);
  border-left: 3px solid var(--second); }
.notes li { overflow-wrap: anywhere; white-space: pre-line; }
.figures { display: flex; flex-wrap: wrap; gap: 24px 56px; margin-top: 40px; }
.figure { display: flex; flex-direction: column; } .figure span, .figure em { color: var(--muted); font-style: normal; }
.figure span::first-letter, th::first-letter { text-transform: uppercase; }
.figure strong { font-size: 44px; font-weight: 500; line-height: 1.15; color: var(--accent); letter-spacing: -.02em; }
.figure strong, table, .facts dd, .chip b { font-variant-numeric: tabular-nums lining-nums; }
.facts { display: flex; flex-wrap: wrap; gap: 12px 40px; margin: 32px 0 0; padding-top: 16px;
  border-top: 1px solid var(--line); }
.facts dt { font-size: 13px; color: var(--muted); } .facts dd { margin: 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; text-align: left; }
th { font-weight: 500; } td, th { padding: 10px 16px 10px 0; vertical-align: top; }
.scores thead th { color: var(--muted); font-size: 13px; padding-bottom: 4px; }
.scores tbody tr:not(.strip) { border-top: 1px solid var(--line); }
.scores td small { display: block; color: var(--muted); white-space: nowrap; }
.better { color: var(--good); } .worse { color: var(--bad); } .strip td { padding: 0 0 16px; }
.track { position: relative; height: 6px; border-radius: 3px; background: var(--line); margin: 4px 6px 0 0; }
.track i { position: absolute; } .band { top: 0; height: 6px; min-width: 4px; border-radius: 3px; opacity: .45; }
.mark { top: -4px; width: 3px; height: 14px; margin-left: -1px; border-radius: 2px; }
.track .first { background: var(--muted); } .track .other { background: var(--accent); }
figure { margin: 0; color: var(--muted); } figure svg { display: block; width: 100%; height: auto; }
.narrow { display: none; }
.scale { display: flex; align-items: center; gap: 8px; margin: 4px 0 0; font-size: 12px; color: var(--muted); }
.scale i { width: 120px; height: 8px; border-radius: 2px;
  background: linear-gradient(to right, color-mix(in srgb, var(--accent) 4%, transparent), var(--accent)); }
.answers { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 16px; }
.answers input { position: absolute; opacity: 0; }
.chip { padding: 4px 12px; border: 1px solid var(--line); border-radius: 16px; font-size: 13px; cursor: pointer; }
.chip b { font-weight: 500; color: var(--muted); } input:checked + .chip { border-color: var(--ink); }
input:focus-visible + .chip { outline: 2px solid var(--accent); outline-offset: 2px; }
.cards { flex-basis: 100%; display: grid; gap: 12px; margin-top: 8px; }
.card { padding: 16px 20px; background: var(--paper); border: 1px solid var(--line); border-radius: 6px;
  border-left: 3px solid var(--line); min-width: 0; }
.card.fixed { border-left-color: var(--good); } .card.broken { border-left-color: var(--bad); }
.prompt { margin: 0 0 12px; font-weight: 500; } .prompt, .card dd { white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 16em; overflow-y: auto; }
.card dl { display: grid; grid-template-columns: 88px 1fr; gap: 8px 16px; margin: 0; }
.card dt { color: var(--muted); font-size: 13px; padding-top: 1px; overflow-wrap: anywhere; }
.card dd { margin: 0; min-width: 0; font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.card em { color: var(--muted); } .yes { color: var(--good); } .no { color: var(--bad); }
mark { background: var(--mark); color: inherit; border-radius: 2px; } .gap { border-left: 2px solid var(--bad); }
#kind-fixed:checked ~ .cards > :not(.fixed), #kind-broken:checked ~ .cards > :not(.broken),
#kind-wrong:checked ~ .cards > :not(.wrong), #kind-right:checked ~ .cards > :not(.right) { display: none; }
details + details, section:has(details) + section:has(details) { margin-top: 16px; }
summary { cursor: pointer; } summary h2 { display: inline; } .plain { margin-top: 12px; font-size: 14px; }
.plain td, .plain th { padding: 5px 16px 5px 0; border-top: 1px solid var(--line); }
.plain th { color: var(--muted); font-weight: 400; width: 34%; } .plain td { overflow-wrap: anywhere; }
.plain th::first-letter, th.name::first-letter { text-transform: none; } .plain th { overflow-wrap: anywhere; }
@media (max-width: 600px) { main { padding: 28px 16px 48px; } h1 { font-size: 26px; } section { margin-top: 36px; }
  .wide { display: none; } .narrow { display: block; } .figures { gap: 16px 32px; } .figure strong { font-size: 34px; }
  td, th { padding-right: 8px; } .scores { font-size: 14px; } .scores td small { font-size: 11.5px;
  white-space: normal; } .facts { display: grid; grid-template-columns: 1fr 1fr; }
  .card { padding: 14px; } .card dl { grid-template-columns: 1fr; gap: 0; } .card dd { margin-bottom: 8px; } }
@media print { .cards { display: block; } .card { break-inside: avoid; margin-bottom: 12px; } .chip { display: none; } }
"""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; the first cell of a row names it."""
    head = "".join(f"<th>{text(each)}</th>" for each in heads)
    body = "".join(_row(row) for row in rows)
    return (
        f'<div class="scroll"><table class="scores"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _row(row: Sequence[str]) -> str:
    cells = "".join(f"<td>{text(cell)}</td>" for cell in row[1:])
    return f'<tr><th class="name">{text(row[0])}</th>{cells}</tr>'


def number(value: Any) -> str:
    """A number of three figures; a dash for none."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}".replace("-", "\N{MINUS SIGN}")
