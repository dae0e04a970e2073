"""What does doctor.html show? One page that needs no network, no scripts and no other file."""

import hashlib
from collections.abc import Iterator
from html import escape
from typing import Any

import numpy as np
from torch import Tensor

from trainer.doctor.numbers import MEAN_GAP
from trainer.pages.kit import BLUE, INK, RED, SOFT, STYLE, WIDTH, as_sentence, html_figure, html_table, new_axis, number

POINTS, WORST = 1000, 100
"""Tokens drawn as points of a plot, and how many of them have the largest |d|; the others are spread evenly."""
BUCKETS = [1e-6, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99, 1.0]
"""Edges of the probability buckets."""
DOTS = {"marker": ".", "linestyle": "", "color": BLUE, "alpha": 0.45, "markersize": 5, "markeredgewidth": 0}
MEAN = {"baseline": None, "color": RED}


def page(data: dict[str, Any], tokens: dict[str, Tensor], table: list[list[str]], worst: list[dict[str, Any]]) -> str:
    """The HTML page.

    `data` comes from `report.as_dict`, `tokens` (drawn in the plots) from `report.columns`, `table` from
    `report.comparison_table`, `worst` from `report.token_table`.
    """
    config, evidence, old = data["config"], data["evidence"], data["old_logprobs"]
    objective, title = config["objective"]["type"], f"Parity doctor: {config['name']}"
    about = f"{config['model']}, {config['dtype']}, T = {config['temperature']:g}, {objective}"
    verdict, _, why = as_sentence(data["sentence"]).partition(": ")
    parts = [
        f'<header class="{data["verdict"]}"><p class="eyebrow">{escape(title)}</p><h1>{verdict}: <small>{why}</small>'
        f"</h1><p>{escape(about)}. Examined in {data['seconds']:.1f} s.</p></header>"
    ]
    for f in data["findings"]:
        parts.append(
            f'<article class="{f["severity"]}"><h3>{escape(f["cause"])}, {escape(f["where"])}</h3>'
            f"<p>{as_sentence(f['evidence'])}</p><p><strong>Remedy:</strong> {as_sentence(f['remedy'])}</p></article>"
        )
    if data["verdict"] == "well":
        parts.append(f"<p><code>old_logprobs</code> is {escape(old['source'])}: {escape(old['why'])}.</p>")
    few = f"At most {POINTS:,} tokens are drawn as points, those with the largest |d| among them."
    parts.append(f"<h2>Token by token</h2><p class='soft'>d = trainer - engine, in nats. {few}</p>")
    parts.append(f"<div class='figures'>{''.join(_plots(data, tokens))}</div>")
    faults = [f for f in data["findings"] if f["severity"] == "fault"]
    failed = {row[0] for row in table for f in faults if f["where"].endswith(row[0])}
    comparisons = [[name + f"\n· {note}" * bool(note), *numbers] for name, *numbers, note in table[1:]]
    parts.append(f"<h2>Comparisons</h2>{html_table([table[0][:-1], *comparisons], 'w' + 'n' * 10, failed)}")
    if not data["comparisons"]:
        parts.append('<p class="soft">This is the short form; <code>unison doctor</code> makes all comparisons.</p>')
    if clip := evidence["clip"]:
        shares = f"{number(clip['tokens'], '.2%')} of the tokens, {number(clip['sequences'], '.2%')} of the sequences"
        parts.append(f"<p>With old_logprobs from the engine, noise alone clips {shares} ({escape(objective)}).</p>")
    if first := data["first_prompt"]:
        words = " ".join(f"<code>{escape(token)}</code>" for token in first["tokens"])
        parts.append(f"<h2>First prompt</h2><p>{first['length']} tokens: {words}</p>")
        parts += [f"<p>Unusual: {as_sentence(oddity)}</p>" for oddity in first["oddities"]]
    covers = [c.values() for c in data["coverage"]]
    parts.append(f"<h2>What each check covers</h2>{html_table([['check', 'covers', 'showed'], *covers], 'nww')}")
    parts += [f'<p class="soft">Not covered: {as_sentence(note)}</p>' for note in evidence["notes"]]
    parts.append(f"<h2>Engine and learner</h2>{_facts(evidence['facts'])}")
    rows = ([f"{v:.4g}" if isinstance(v, float) else repr(v) for v in row.values()] for row in worst)
    parts.append(f"<h2>Worst tokens</h2>{html_table([list(worst[0]), *rows], 'nnnttnnnn')}")
    parts.append(f"<h2>Environment</h2>{html_table([['package', 'version'], *data['stack'].items()], 'nn')}")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><meta name="viewport" content="width=device-width">'
    top = f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>'
    return "\n".join([top, "<body><main>", *parts, "</main></body></html>", ""])


def _facts(facts: dict[str, Any]) -> str:
    """The settings of each side. A long value is shown by its length and digest."""
    cut = facts["learner"]["truncation"] or {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    sides = {f"engine {i}": engine for i, engine in enumerate(facts["engines"])}
    sides |= {"learner": {**facts["learner"], **cut}, "driver": facts["driver"]}

    def short(value: Any) -> str:
        digest = hashlib.sha256(str(value).encode()).hexdigest()[:8]
        return text if len(text := str(value)) <= 40 else f"{len(value)} long, sha256 {digest}"

    names = [n for n in dict.fromkeys(n for side in sides.values() for n in side) if n != "truncation"]
    rows = [[n, *(short(side[n]) if n in side else "" for side in sides.values())] for n in names]
    differ = {n for n, *values in rows if len(set(values) - {""}) > 1}
    return html_table([["", *sides], *rows], "n" + "w" * len(sides), differ)


def _plots(data: dict[str, Any], tokens: dict[str, Tensor]) -> list[str]:
    """Each plot as a figure of the page."""
    import matplotlib

    inked = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    style = {"svg.fonttype": "none", "svg.hashsalt": "", "text.parse_math": False, "font.size": 9}
    style |= dict.fromkeys(inked, INK) | {"axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        return [html_figure(f"plot{i}", caption, axis) for i, (caption, axis) in enumerate(_axes(data, tokens))]


def _axes(data: dict[str, Any], tokens: dict[str, Tensor]) -> Iterator[tuple[str, Any]]:
    """Caption and drawing of each plot."""
    few, t = _finite(tokens)
    if len(t["d"]):
        axis = new_axis("engine (nats)", "trainer (nats)")
        axis.axline((0, 0), slope=1, color=SOFT, linewidth=0.8)
        axis.plot(few["rollout"], few["trainer"], **DOTS)
        yield "Log-probability of each token on both sides. Points on the line are equal.", axis

        edges = np.unique(np.linspace(0, t["position"].max() + 1, 13).astype(int))
        axis = new_axis("position in the reply", "d (nats)")
        axis.plot(few["position"], few["d"], **DOTS)
        axis.stairs(_means(t["position"], t["d"], edges), edges, **MEAN)
        yield "d by position in the reply; its mean in red. A drift shows here.", axis

        p = np.exp(t["rollout"])
        axis = new_axis("probability of the token", "d (nats)", scale="log")
        axis.set_xlim(max(p.min() / 2, BUCKETS[0]), 1.5)
        axis.plot(np.exp(few["rollout"]), few["d"], **DOTS)
        for sign in (1, -1):
            axis.stairs(sign * _means(p, np.abs(t["d"]), BUCKETS), BUCKETS, **MEAN)
        yield "d by the token's probability; plus and minus mean |d| in red.", axis

        versions = np.unique(t["version"])
        if len(versions) > 1:
            axis = new_axis("weight version", "d (nats)")
            axis.plot(few["version"], few["d"], **DOTS)
            edges = np.append(versions, versions[-1] + 1) - 0.5
            axis.stairs(_means(t["version"], t["d"], edges), edges, **MEAN)
            yield "d by the weight version that sampled the token; its mean in red.", axis

        yield _ratios(data["config"], t)
    comparisons = [r for r in data["comparisons"] if r["gap"] and r["gap"]["mean_abs"] is not None]
    if comparisons:
        yield _comparisons(comparisons, data["config"]["dtype"])


def _finite(tokens: dict[str, Tensor]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The tokens with a finite d: those drawn as points, and all of them."""
    t = {name: column[tokens["d"].isfinite()].numpy() for name, column in tokens.items()}
    order = np.argsort(-np.abs(t["d"]))
    rest = np.sort(order[WORST:])
    spread = rest[np.linspace(0, len(rest) - 1, min(len(rest), POINTS - WORST)).astype(int)]
    chosen = np.concatenate([order[:WORST], spread])
    return {name: column[chosen] for name, column in t.items()}, t


def _means(x: np.ndarray, y: np.ndarray, edges: Any) -> np.ndarray:
    """Mean y of each bucket of x; values outside count to the nearest bucket."""
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
    axis = new_axis("log-ratio trainer / engine (nats)", config["ratio"] + "s")
    axis.hist(d, bins=40, range=(min(d.min(), *bounds), max(d.max(), *bounds)) if bounds else None, color=BLUE)
    axis.locator_params(axis="y", integer=True)
    for bound in bounds:
        axis.axvline(bound, color=RED, linestyle="--", linewidth=1)
    caption = "Mean log-ratio of each sequence" if whole else "Log-ratio of each token"
    return caption + (f"; between the lines {objective['type']} does not clip." if bounds else "."), axis


def _comparisons(comparisons: list[dict[str, Any]], dtype: str) -> tuple[str, Any]:
    """Plot of the mean and largest |d| of each comparison."""
    axis, limit = new_axis("|d| (nats)", "", 2 * WIDTH, 0.9 + 0.28 * len(comparisons), "log"), MEAN_GAP[dtype]
    seen = [r["gap"][name] for r in comparisons for name in ("mean_abs", "max_abs") if r["gap"][name]]
    left = min([*seen, limit]) / 3
    for y, r in enumerate(comparisons):
        mean, most = r["gap"]["mean_abs"], r["gap"]["max_abs"]
        axis.plot([max(mean, left), max(most, left)], [y, y], color=BLUE, linewidth=1)
        axis.plot([max(mean, left)], [y], "o", color=BLUE, markersize=6, markerfacecolor=BLUE if mean else "none")
    axis.axvline(limit, color=RED, linestyle="--", linewidth=1)
    axis.set(yticks=range(len(comparisons)), yticklabels=[r["name"] for r in comparisons])
    axis.invert_yaxis()
    limits = f"Dashed: the limit in {dtype}; other precisions have their own."
    return f"Mean |d| of each comparison, with a line to the largest |d|. A hollow point is exactly 0. {limits}", axis
