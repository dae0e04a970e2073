"""What doctor.html shows: one page that needs no network, no scripts and no other file."""

import hashlib
import io
import re
from collections.abc import Container, Iterator
from html import escape
from typing import Any

import numpy as np
from torch import Tensor

from trainer.doctor.diagnosis import MEAN_GAP

POINTS, WORST = 1000, 100
"""Tokens drawn as points of a plot, and how many of them for their |d|; the others are spread evenly over the rest."""
BUCKETS = [1e-6, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99, 1.0]
"""Edges of the probability buckets."""
INKS = {"#010101": "var(--ink)", "#020202": "var(--soft)", "#030303": "var(--blue)", "#040404": "var(--red)"}
"""What stands for the page's colours while matplotlib draws, so that plots follow the reader's light or dark scheme."""
INK, SOFT, BLUE, RED = INKS
DOTS = {"marker": ".", "linestyle": "", "color": BLUE, "alpha": 0.45, "markersize": 5, "markeredgewidth": 0}
MEAN = {"baseline": None, "color": RED}
WIDTH = 4.6
"""Inches of a plot; what is wider takes the page's whole width."""

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
    """The number, or n/a for what JSON has no number for."""
    return "n/a" if value is None else format(value + 0.0, form)  # + 0.0 turns -0.0 into 0.0


def page(data: dict[str, Any], tokens: dict[str, Tensor], ladder: list[list[str]], worst: list[dict[str, Any]]) -> str:
    """The whole HTML of `as_dict`'s data; `tokens` are the `columns` that are drawn, `worst` rows of `token_table`."""
    config, evidence, old = data["config"], data["evidence"], data["old_logprobs"]
    objective, title = config["objective"]["type"], f"Parity doctor: {config['name']}"
    about = f"{config['model']}, {config['dtype']}, T = {config['temperature']:g}, {objective}"
    verdict, _, why = _sentence(data["sentence"]).partition(": ")
    parts = [
        f'<header class="{data["verdict"]}"><p class="eyebrow">{escape(title)}</p><h1>{verdict}: <small>{why}</small>'
        f"</h1><p>{escape(about)}. Examined in {data['seconds']:.1f} s.</p></header>"
    ]
    for f in data["findings"]:
        parts.append(
            f'<article class="{f["severity"]}"><h3>{escape(f["cause"])}, {escape(f["where"])}</h3>'
            f"<p>{_sentence(f['evidence'])}</p><p><strong>Remedy:</strong> {_sentence(f['remedy'])}</p></article>"
        )
    if data["verdict"] == "well":
        parts.append(f"<p><code>old_logprobs</code> is {escape(old['source'])}: {escape(old['why'])}.</p>")
    few = f"At most {POINTS:,} tokens are drawn as points, those with the largest |d| among them."
    parts.append(f"<h2>Token by token</h2><p class='soft'>d = trainer - engine, in nats. {few}</p>")
    parts.append(f"<div class='figures'>{''.join(_plots(data, tokens))}</div>")
    faults = [f for f in data["findings"] if f["severity"] == "fault"]
    failed = {row[0] for row in ladder for f in faults if f["where"].endswith(row[0])}
    rungs = [[name + f"\n· {note}" * bool(note), *numbers] for name, *numbers, note in ladder[1:]]
    parts.append(f"<h2>The ladder</h2>{_table([ladder[0][:-1], *rungs], 'w' + 'n' * 10, failed)}")
    if not data["rungs"]:
        parts.append('<p class="soft">This is the short form; <code>unison doctor</code> climbs the whole ladder.</p>')
    if clip := evidence["clip"]:
        shares = f"{number(clip['tokens'], '.2%')} of the tokens, {number(clip['sequences'], '.2%')} of the sequences"
        parts.append(f"<p>With old_logprobs from the engine, noise alone clips {shares} ({escape(objective)}).</p>")
    covers = [c.values() for c in data["coverage"]]
    parts.append(f"<h2>Which check covers what</h2>{_table([['check', 'covers', 'showed'], *covers], 'nww')}")
    parts += [f'<p class="soft">Not covered: {_sentence(note)}</p>' for note in evidence["notes"]]
    parts.append(f"<h2>Engine and learner</h2>{_facts(evidence['facts'])}")
    rows = ([f"{v:.4g}" if isinstance(v, float) else repr(v) for v in row.values()] for row in worst)
    parts.append(f"<h2>Worst tokens</h2>{_table([list(worst[0]), *rows], 'nnnttnnnn')}")
    parts.append(f"<h2>Environment</h2>{_table([['package', 'version'], *data['stack'].items()], 'nn')}")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><meta name="viewport" content="width=device-width">'
    top = f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>'
    return "\n".join([top, "<body><main>", *parts, "</main></body></html>", ""])


def _sentence(text: str) -> str:
    return f"{escape(text[:1].upper() + text[1:]).rstrip('.')}."


def _table(rows: list[Any], kinds: str, bad: Container[str] = ()) -> str:
    """The first row is the head. One letter for each column: n does not wrap, w does, t is a token's text. A row stands
    out if `bad` has the first line of its first cell."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = ""
    for first, *rest in rows[1:]:
        cells = (f'<td class="{k}">{escape(c)}</td>' for k, c in zip(kinds, [first, *rest], strict=True))
        body += f"<tr{' class=bad' if first.splitlines()[0] in bad else ''}>{''.join(cells)}</tr>\n"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _facts(facts: dict[str, Any]) -> str:
    """What each side says of itself. A long value is told apart from another by its digest."""
    cut = facts["learner"]["truncation"] or {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    sides = {f"engine {i}": engine for i, engine in enumerate(facts["engines"])}
    sides |= {"learner": {**facts["learner"], **cut}, "driver": facts["driver"]}

    def short(value: Any) -> str:
        digest = hashlib.sha256(str(value).encode()).hexdigest()[:8]
        return text if len(text := str(value)) <= 40 else f"{len(value)} long, sha256 {digest}"

    names = [n for n in dict.fromkeys(n for side in sides.values() for n in side) if n != "truncation"]
    rows = [[n, *(short(side[n]) if n in side else "" for side in sides.values())] for n in names]
    differ = {n for n, *values in rows if len(set(values) - {""}) > 1}
    return _table([["", *sides], *rows], "n" + "w" * len(sides), differ)


def _plots(data: dict[str, Any], tokens: dict[str, Tensor]) -> list[str]:
    """Each plot as a figure of the page."""
    import matplotlib

    inked = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    style = {"svg.fonttype": "none", "svg.hashsalt": "", "text.parse_math": False, "font.size": 9}
    style |= dict.fromkeys(inked, INK) | {"axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        return [_figure(f"plot{i}", caption, axis) for i, (caption, axis) in enumerate(_axes(data, tokens))]


def _figure(key: str, caption: str, axis: Any) -> str:
    file = io.StringIO()
    axis.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r'\A.*?(?=<svg)|<metadata>.*?</metadata>| xmlns(:xlink)?=".*?"', "", file.getvalue(), flags=re.DOTALL)
    # Every plot has the same ids, and HTML knows `href` without a name space.
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\1{key}-", svg.replace("xlink:href", "href"))
    svg = re.sub("|".join(INKS), lambda ink: INKS[ink[0]], svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
    kind = "wide" if axis.figure.get_figwidth() > WIDTH else ""
    return f'<figure class="{kind}"><div class="scroll">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _axis(xlabel: str, ylabel: str, width: float = WIDTH, height: float = 3.1, scale: str = "linear") -> Any:
    from matplotlib.figure import Figure

    axis = Figure(figsize=(width, height), layout="tight").subplots()
    axis.set(xlabel=xlabel, ylabel=ylabel, xscale=scale)
    if scale == "log":
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    return axis


def _axes(data: dict[str, Any], tokens: dict[str, Tensor]) -> Iterator[tuple[str, Any]]:
    """Caption and drawing of each plot."""
    few, t = _finite(tokens)
    if len(t["d"]):
        axis = _axis("engine (nats)", "trainer (nats)")
        axis.axline((0, 0), slope=1, color=SOFT, linewidth=0.8)
        axis.plot(few["rollout"], few["trainer"], **DOTS)
        yield "What both say about each token. On the line they say the same.", axis

        edges = np.unique(np.linspace(0, t["position"].max() + 1, 13).astype(int))
        axis = _axis("position in the reply", "d (nats)")
        axis.plot(few["position"], few["d"], **DOTS)
        axis.stairs(_means(t["position"], t["d"], edges), edges, **MEAN)
        yield "d along the reply, in red its mean: a drift shows here.", axis

        p = np.exp(t["rollout"])
        axis = _axis("probability of the token", "d (nats)", scale="log")
        axis.set_xlim(max(p.min() / 2, BUCKETS[0]), 1.5)
        axis.plot(np.exp(few["rollout"]), few["d"], **DOTS)
        for sign in (1, -1):
            axis.stairs(sign * _means(p, np.abs(t["d"]), BUCKETS), BUCKETS, **MEAN)
        yield "d by how likely the token was, in red plus and minus mean |d|.", axis

        versions = np.unique(t["version"])
        if len(versions) > 1:
            axis = _axis("weight version", "d (nats)")
            axis.plot(few["version"], few["d"], **DOTS)
            edges = np.append(versions, versions[-1] + 1) - 0.5
            axis.stairs(_means(t["version"], t["d"], edges), edges, **MEAN)
            yield "d by the version of the weights that sampled the token, in red its mean.", axis

        yield _ratios(data["config"], t)
    rungs = [r for r in data["rungs"] if r["gap"] and r["gap"]["mean_abs"] is not None]
    if rungs:
        yield _ladder(rungs, data["config"]["dtype"])


def _finite(tokens: dict[str, Tensor]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Of the tokens with a finite d, those drawn as points, and all."""
    t = {name: column[tokens["d"].isfinite()].numpy() for name, column in tokens.items()}
    order = np.argsort(-np.abs(t["d"]))
    rest = np.sort(order[WORST:])
    spread = rest[np.linspace(0, len(rest) - 1, min(len(rest), POINTS - WORST)).astype(int)]
    chosen = np.concatenate([order[:WORST], spread])
    return {name: column[chosen] for name, column in t.items()}, t


def _means(x: np.ndarray, y: np.ndarray, edges: Any) -> np.ndarray:
    """Mean y of each bucket of x; what lies outside counts to the nearest."""
    bucket = np.clip(np.digitize(x, edges), 1, len(edges) - 1) - 1
    count, total = (np.bincount(bucket, w, minlength=len(edges) - 1) for w in (None, y))
    return total / np.where(count, count, np.nan)


def _ratios(config: dict[str, Any], t: dict[str, np.ndarray]) -> tuple[str, Any]:
    """What the objective would clip although nothing was learned."""
    objective, whole = config["objective"], config["ratio"] == "sequence"
    _, rows = np.unique(np.stack([t["engine"], t["sequence"]]), axis=1, return_inverse=True)
    d = np.bincount(rows.ravel(), t["d"]) / np.bincount(rows.ravel()) if whole else t["d"]
    low, high = objective.get("clip_low"), objective.get("clip_high")
    bounds = [np.log1p(-low), np.log1p(high)] if high and low and low < 1 else []
    axis = _axis("log-ratio trainer / engine (nats)", config["ratio"] + "s")
    axis.hist(d, bins=40, range=(min(d.min(), *bounds), max(d.max(), *bounds)) if bounds else None, color=BLUE)
    axis.locator_params(axis="y", integer=True)
    for bound in bounds:
        axis.axvline(bound, color=RED, linestyle="--", linewidth=1)
    caption = "Mean log-ratio of each sequence" if whole else "Log-ratio of each token"
    return caption + (f"; between the lines {objective['type']} does not clip." if bounds else "."), axis


def _ladder(rungs: list[dict[str, Any]], dtype: str) -> tuple[str, Any]:
    """Mean and largest |d| of each rung."""
    axis, limit = _axis("|d| (nats)", "", 2 * WIDTH, 0.9 + 0.28 * len(rungs), "log"), MEAN_GAP[dtype]
    seen = [r["gap"][name] for r in rungs for name in ("mean_abs", "max_abs") if r["gap"][name]]
    left = min([*seen, limit]) / 3
    for y, r in enumerate(rungs):
        mean, most = r["gap"]["mean_abs"], r["gap"]["max_abs"]
        axis.plot([max(mean, left), max(most, left)], [y, y], color=BLUE, linewidth=1)
        axis.plot([max(mean, left)], [y], "o", color=BLUE, markersize=6, markerfacecolor=BLUE if mean else "none")
    axis.axvline(limit, color=RED, linestyle="--", linewidth=1)
    axis.set(yticks=range(len(rungs)), yticklabels=[r["name"] for r in rungs])
    axis.invert_yaxis()
    limits = f"Dashed: the limit in {dtype}; other precisions have their own."
    return f"Mean |d| of each rung, with a line to its largest. A hollow one is exactly 0. {limits}", axis
