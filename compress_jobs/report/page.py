"""The page that a report stands on: escaped text, numbers in words, tables, figures, the stylesheet."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

# Controls, halves of surrogate pairs and marks that turn the writing direction: none has a place in a name or a
# message, and some cannot even be encoded.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_SCROLL_ROWS = 24

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 50rem; background: #fff; color: #1b1f24;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; padding-top: .75rem; border-top: 2px solid #1b1f24; }
p, figcaption { max-width: 44rem; }
.where { margin: 0; color: #4a5056; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.card { border: 1px solid #b8bdc3; border-radius: .4rem; padding: .7rem .8rem; }
.card dt { font-size: .85rem; color: #4a5056; }
.card dd { margin: 0; font-size: .85rem; overflow-wrap: anywhere; }
.card .value { font-size: 1.3rem; line-height: 1.35; font-weight: 650; font-variant-numeric: tabular-nums; }
nav ul { padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; list-style: none; }
a { color: #005a8c; }
figure { margin: 1rem 0 1.25rem; }
.rows { overflow-x: auto; }
.chart { display: block; width: 100%; max-width: 41rem; height: auto; }
.chart * { stroke-linejoin: round; }
.chart text { font-family: inherit !important; }
figcaption { margin-top: .5rem; }
figcaption b { font-weight: 650; }
.read { color: #4a5056; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: min(100%, 20rem); }
caption { text-align: left; font-weight: 650; padding: .25rem 0; }
th, td { text-align: left; vertical-align: top; padding: .22rem .9rem .22rem 0; border-bottom: 1px solid #dde0e4;
  white-space: nowrap; }
tbody th { font-weight: 400; }
thead th { vertical-align: bottom; border-bottom: 1.5px solid #6b7177; white-space: normal; }
.number { text-align: right; }
.words { white-space: normal; overflow-wrap: anywhere; min-width: 10rem; }
.rows { margin: .75rem 0 1.25rem; }
.long { width: fit-content; max-width: 100%; max-height: 26rem; overflow-y: auto;
  border: 1px solid #b8bdc3; border-radius: .4rem; padding: 0 .8rem; }
.long thead th { position: sticky; top: 0; background: #fff; }
.note { border-left: 4px solid #6b7177; padding-left: .75rem; }
footer { margin-top: 3rem; font-size: .85rem; color: #4a5056; }
@page { margin: 16mm 15mm; }
@media print {
  body { padding: 0; max-width: none; font-size: 10pt; color: #000; }
  nav { display: none; }
  h2 { break-after: avoid; margin-top: 1.5rem; }
  figure, .card, tr, .rows:not(.long) { break-inside: avoid; }
  .cards { grid-template-columns: repeat(auto-fit, minmax(3.6cm, 1fr)); }
  .rows, .long { overflow: visible; max-height: none; border: 0; padding: 0; }
  .chart { max-width: 15cm; }
  .long thead th { position: static; }
}
"""


@dataclass(frozen=True)
class Section:
    """``body`` is HTML; ``title`` is not."""

    anchor: str
    title: str
    body: str


def clean(value: object) -> str:
    return _UNPRINTABLE.sub("\ufffd", str(value))


def escape(value: object) -> str:
    return html.escape(clean(value))


def error_text(error: float | None) -> str:
    if error is None or not math.isfinite(error):
        return "–"
    if error == 0:
        return "0"
    return f"{error:.4f}" if abs(error) >= 0.001 else f"{error:.1e}"


def size_text(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.3g} {unit}" if num_bytes < 1000 * size else f"{num_bytes / size:,.0f} {unit}"
    return f"{num_bytes:.0f} B"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def paragraph(text: str, kind: str = "") -> str:
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>\n"


def figure(svg: str, how_to_read: str, here: str) -> str:
    """A figure with the sentence that says how to read it, and the one that says what it shows here."""
    return (
        f'<figure>\n{svg}\n<figcaption><span class="read">{escape(how_to_read)}</span> '
        f"<b>Here:</b> {escape(here)}</figcaption>\n</figure>\n"
    )


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns whose header begins with ">" hold numbers. What is long scrolls on a screen, and not in print."""
    numeric = [name.startswith(">") for name in header]
    head = "".join(_cell("th", "col", name.removeprefix(">"), n) for name, n in zip(header, numeric, strict=True))
    lines = []
    for row in rows:
        cells = [_cell("td" if i else "th", "" if i else "row", str(cell), numeric[i]) for i, cell in enumerate(row)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    is_long = ' class="rows long"' if len(rows) > _SCROLL_ROWS else ' class="rows"'
    return (
        f'<div{is_long} role="group" tabindex="0" aria-label="{escape(caption)}">\n<table>'
        f"<caption>{escape(caption)}</caption>\n"
        + (f"<thead><tr>{head}</tr></thead>\n" if any(header) else "")
        + "<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>\n"
    )


def _cell(tag: str, scope: str, content: str, is_number: bool) -> str:
    # Only what is long may be broken: a message, a path, an id of two long segments.
    kind = "number" if is_number else "words" if len(content) > 32 else ""
    attributes = (f' scope="{scope}"' if scope else "") + (f' class="{kind}"' if kind else "")
    return f"<{tag}{attributes}>{escape(content)}</{tag}>"


def cards(values: Sequence[tuple[str, str, str]]) -> str:
    """Label, value, what else is to be said of it."""
    items = (
        f'<div class="card"><dt>{escape(label)}</dt><dd class="value">{escape(value)}</dd><dd>{escape(more)}</dd></div>'
        for label, value, more in values
    )
    return '<dl class="cards">' + "\n".join(items) + "</dl>\n"


def page(title: str, top: str, sections: Sequence[Section], foot: str) -> str:
    links = "".join(f'<li><a href="#{section.anchor}">{escape(section.title)}</a></li>' for section in sections)
    body = "".join(
        f'<section id="{section.anchor}">\n<h2>{escape(section.title)}</h2>\n{section.body}</section>\n'
        for section in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f'<style>{STYLE}</style>\n</head>\n<body>\n<header>\n{top}<nav aria-label="Sections"><ul>{links}</ul></nav>\n'
        f"</header>\n<main>\n{body}</main>\n<footer>{escape(foot)}</footer>\n</body>\n</html>\n"
    )
