"""What are our HTML pages made of? Style, tables and figures."""

import io
import re
from collections.abc import Container
from html import escape
from typing import Any

INKS = {"#010101": "var(--ink)", "#020202": "var(--soft)", "#030303": "var(--blue)", "#040404": "var(--red)"}
"""Placeholder colours for matplotlib, replaced by the page's own: plots follow the reader's light or dark scheme."""
INK, SOFT, BLUE, RED = INKS
WIDTH = 4.6
"""Width of a plot in inches; a wider plot takes the page's whole width."""
STYLE = """
:root { color-scheme: light dark; --paper: #fcfbf8; --ink: #1d1c1a; --soft: #706b63; --line: #e2ded6;
  --blue: #2a6296; --red: #b3261e; --green: #2d6a3e; --amber: #8a5a00;
  --sans: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
@media (prefers-color-scheme: dark) { :root { --paper: #171614; --ink: #e9e5dd; --soft: #a19a8e; --line: #37342f;
  --blue: #86b6e2; --red: #f2938c; --green: #8cc79b; --amber: #e0b45e; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1.0625rem/1.6 "Iowan Old Style", Charter,
  "Palatino Linotype", Palatino, "Book Antiqua", Georgia, serif; }
main { max-width: 60rem; margin: 0 auto; padding: 3.5rem 1.25rem 5rem; }
header, article { border-left: 3px solid var(--green); padding-left: 1.25rem; margin-bottom: 1.6rem; }
.warning { border-color: var(--amber); } .fault { border-color: var(--red); } code, small { font-size: .9em; }
.warning h3 { color: var(--amber); } .fault h3, .fault small, .bad td { color: var(--red); }
h1 { font-size: clamp(1.5rem, 1.2rem + 1.4vw, 2.1rem); line-height: 1.3; font-weight: 600; margin: .3rem 0 .6rem; }
h1 small { display: block; font-size: 1.15rem; font-weight: 400; } h2 { font-size: 1.2rem; margin: 3rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0; } p { margin: .4rem 0; max-width: 44rem; overflow-wrap: anywhere; }
.soft, figcaption, header p { color: var(--soft); } .eyebrow { font: .8rem var(--sans); letter-spacing: .04em; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 2rem 2.5rem; }
figure { margin: 0; min-width: 0; } figure.wide { grid-column: 1 / -1; } figcaption { font-size: .9rem; }
svg { display: block; width: 100%; height: auto; } svg text { font-family: var(--sans) !important; }
.wide svg { min-width: 40rem; } .scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font: .8rem/1.45 var(--sans); font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; white-space: nowrap; } td.n { white-space: nowrap; }
td.t { font-family: ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; }
td.w { min-width: 14rem; white-space: pre-line; }
"""


def number(value: float | None, form: str = ".1e") -> str:
    """The number as text; n/a for None, which JSON holds in place of NaN and infinity."""
    return "n/a" if value is None else format(value + 0.0, form)  # + 0.0 turns -0.0 into 0.0


def as_sentence(text: str) -> str:
    """The text in HTML, with a capital first letter and a full stop."""
    return f"{escape(text[:1].upper() + text[1:]).rstrip('.')}."


def html_table(rows: list[Any], kinds: str, bad: Container[str] = ()) -> str:
    """Rows as an HTML table; the first row is the head.

    `kinds` has one letter per column: n does not wrap, w wraps, t is a token's text. A row is marked if `bad` holds the
    first line of its first cell.
    """
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = ""
    for first, *rest in rows[1:]:
        cells = (f'<td class="{k}">{escape(c)}</td>' for k, c in zip(kinds, [first, *rest], strict=True))
        body += f"<tr{' class=bad' if first.splitlines()[0] in bad else ''}>{''.join(cells)}</tr>\n"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def html_figure(key: str, caption: str, axis: Any) -> str:
    """A matplotlib axis as an inline SVG with a caption. `key` makes the ids in it unique on the page."""
    file = io.StringIO()
    axis.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r'\A.*?(?=<svg)|<metadata>.*?</metadata>| xmlns(:xlink)?=".*?"', "", file.getvalue(), flags=re.DOTALL)
    # Every plot has the same ids, and HTML writes `href` without a name space.
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\1{key}-", svg.replace("xlink:href", "href"))
    svg = re.sub("|".join(INKS), lambda ink: INKS[ink[0]], svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
    kind = "wide" if axis.figure.get_figwidth() > WIDTH else ""
    return f'<figure class="{kind}"><div class="scroll">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>'


def new_axis(xlabel: str, ylabel: str, width: float = WIDTH, height: float = 3.1, scale: str = "linear") -> Any:
    """An empty matplotlib axis; width and height in inches."""
    from matplotlib.figure import Figure

    axis = Figure(figsize=(width, height), layout="tight").subplots()
    axis.set(xlabel=xlabel, ylabel=ylabel, xscale=scale)
    if scale == "log":
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    return axis
