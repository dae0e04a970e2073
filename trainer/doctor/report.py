"""How is a doctor's report shown? On the terminal, in doctor.json, in doctor.html, and token by token."""

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from rl.objectives import GSPO
from rl.parity.evidence import WeightEvidence
from rl.typed import shortened
from trainer.doctor.doctor import DoctorReport
from trainer.doctor.page import page
from trainer.pages.kit import number
from trainer.runs.files import without_nan, write_json
from trainer.runs.settings import resolved
from trainer.tracking.terminal import console
from trainer.tracking.tracker import RunTracker

Decode = Callable[[list[int]], str]
CONTEXT, WRAPPED = 8, 28
"""Tokens shown before a token, and characters above which a column of the terminal's tables wraps."""
TEXTS = ("comparison", "tokens", "mean |d|", "p99 |d|", "max |d|", "k1 ± se", "k3 ± se", "chi2", "E[e^|d|]")
TEXTS += ("outside [0.5, 2]", "ESS token / sequence", "note")


# -- as values ---------------------------------------------------------------------------------------------------------


def as_dict(report: DoctorReport) -> dict[str, Any]:
    """The whole report as JSON values: null for NaN, digests as counts."""
    settings, e, first = resolved(report.config), report.check.evidence, report.first_prompt
    config = {name: settings[name] for name in ("name", "model", "dtype", "temperature", "objective", "old_logprobs")}
    values = {
        "verdict": report.verdict,
        "sentence": sentence(report),
        "seconds": report.seconds,
        # The objective clips the mean log-ratio of a sequence, or the log-ratio of each token.
        "config": config | {"ratio": "sequence" if isinstance(report.config.objective, GSPO) else "token"},
        "stack": report.stack,
        "old_logprobs": dict(zip(("source", "why"), report.old_logprobs, strict=True)),
        "first_prompt": first and {"length": len(first.tokens), "tokens": first.ends(), "oddities": first.oddities},
        "findings": [asdict(f) | {"remedy": f.remedy} for f in report.findings],
        "comparisons": report.comparisons,
        "coverage": [{"check": check, "covers": what, "showed": seen} for check, what, seen in report.coverage()],
        "evidence": {
            "facts": {"engines": e.engine_facts, "learner": e.learner_facts, "driver": e.driver_facts},
            "samples": e.samples,
            "weights": [_weights(w) for w in e.weights],
            "clip": e.clip,
            "notes": e.notes,
        },
    }
    return without_nan(json.loads(json.dumps(values, default=asdict)))


def _weights(w: WeightEvidence) -> dict[str, Any]:
    """One engine's weights: digests as counts, the names that differ, and the ten worst layers."""
    names = {
        "moved": [name for name, digest in w.live.items() if w.sent.get(name) != digest],
        "lost": sorted({name for got in w.received for name in w.sent if name not in got}),
        "changed": sorted({n for got in w.received for n, digest in w.sent.items() if got.get(n, digest) != digest}),
    }
    digests = {"sent": len(w.sent), "equal": bit_for_bit(w), **names}
    worst = sorted(w.layers, key=lambda x: (math.isnan(x.error), x.error), reverse=True)[:10]
    rest = {"version": w.version, "uncovered": w.uncovered, "cached_after_update": w.cached_after_update}
    return {"engine": w.engine, "digests": digests, "layers": len(w.layers), "worst_layers": worst, **rest}


def bit_for_bit(w: WeightEvidence) -> int:
    """How many tensors arrived at every worker as the learner holds them now."""
    sides = [w.live, *w.received]
    return sum(all(s.get(name) == digest for s in sides) for name, digest in w.sent.items()) if w.received else 0


def columns(report: DoctorReport) -> dict[str, Tensor]:
    """One entry per sampled token: engine, sequence and column in its batch, position in the reply, rollout and trainer
    log-probability (nats), d = trainer - rollout, weight version."""
    parts, check = [], report.check
    for engine, (batch, trainer) in enumerate(zip(check.batches, check.trainer, strict=True)):
        at = row, column = batch.mask.nonzero(as_tuple=True)
        theirs, mine = batch.rollout_logprobs[at].double(), trainer[at].double()
        place = {"engine": torch.full_like(row, engine), "sequence": row, "column": column}
        place["position"] = column - batch.mask.int().argmax(dim=1)[row]
        parts.append(place | {"rollout": theirs, "trainer": mine, "d": mine - theirs, "version": batch.versions[at]})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def token_table(report: DoctorReport, decode: Decode, most: int = 2000) -> list[dict[str, Any]]:
    """One row per sampled token, the largest |d| first (NaN counts as largest), at most `most` rows."""
    tokens, table, texts = columns(report), [], {}
    order = tokens["d"].abs().argsort(descending=True, stable=True)[:most]
    ids = [batch.input_ids.tolist() for batch in report.check.batches]
    for values in zip(*(column[order].tolist() for column in tokens.values()), strict=True):
        t = dict(zip(tokens, values, strict=True))
        sequence, end = ids[t["engine"]][t["sequence"]], t.pop("column") + 1
        token = sequence[end]
        if token not in texts:
            texts[token] = decode([token])
        logprobs = {f"{side}_logprob": t.pop(side) for side in ("rollout", "trainer")}
        context = decode(sequence[max(0, end - CONTEXT) : end])
        place = {name: t.pop(name) for name in ("engine", "sequence", "position")}
        table.append({**place, "token": texts[token], "context": context, **logprobs, **t})
    return table


# -- as text -----------------------------------------------------------------------------------------------------------


def sentence(report: DoctorReport) -> str:
    """The verdict in one sentence."""
    if report.faults:
        return f"engines and trainer do not agree: {', '.join(dict.fromkeys(f.cause for f in report.faults))}"
    e = report.check.evidence
    g = max((s.gap for s in e.samples), key=lambda g: (math.isnan(g.mean_abs), g.mean_abs))
    where = f" on the worst of {len(e.samples)} engines" if len(e.samples) > 1 else ""
    layers = sum(len(w.layers) for w in e.weights)
    return (
        f"engines and trainer agree: mean |d| {g.mean_abs:.1e} nats over {g.tokens:,} tokens{where}, k3 {g.k3:.1e}, "
        f"{sum(map(bit_for_bit, e.weights)):,} tensors bit for bit, {layers or 'no'} layers"
    )


def comparison_table(data: dict[str, Any]) -> list[list[str]]:
    """The comparisons of `as_dict`'s data as rows of text, the head first; engines without one get a row too."""
    comparisons = list(data["comparisons"])
    for s in data["evidence"]["samples"][bool(comparisons) :]:
        comparisons.append(
            {"name": f"rollout | trainer, engine {s['engine']}", "gap": s["gap"], "note": "", "held": True}
        )
    return [list(TEXTS), *map(_comparison_row, comparisons)]


def _comparison_row(comparison: dict[str, Any]) -> list[str]:
    g, note = comparison["gap"], comparison["note"] + ("" if comparison["held"] else " (no limit applies)")
    if g is None:
        return [comparison["name"], *[""] * (len(TEXTS) - 2), note.strip()]
    sizes = [number(g[name]) for name in ("mean_abs", "p99_abs", "max_abs")]
    k1, k3 = (f"{number(g[n], form)} ± {number(g[n + '_se'], '.0e')}" for n, form in (("k1", "+.1e"), ("k3", ".1e")))
    mult = "n/a" if g["mult"] is None else f"1 + {g['mult'] - 1:.1e}"
    ess = f"{number(g['ess_token'], '.3f')} / {number(g['ess_sequence'], '.3f')}"
    rest = [k1, k3, number(g["chi2"], "+.1e"), mult, number(g["outside"], ".2%"), ess]
    return [comparison["name"], f"{g['tokens']:,}", *sizes, *rest, note.strip()]


def show(report: DoctorReport, decode: Decode = str) -> None:
    """Print the verdict in one line, a block for each finding, and, where there are any, comparisons and coverage.

    `decode` maps token ids to text; without it the worst token is shown as ids.
    """
    if report.comparisons:
        _show_comparisons(report, decode)
    console.print(Text(f"{sentence(report)}; {report.seconds:.1f} s", "bold red" if report.faults else "green"))
    if not report.faults and report.config.old_logprobs == "auto":
        console.print(Text("old_logprobs: {}, because {}".format(*report.old_logprobs)))
    for f in report.findings:
        if f.severity == "warning":
            console.print(Text(f"warning: {f}", "yellow"))
        else:
            head = Text(f"fault: {f.cause}, {f.where}", "bold red")
            console.print(head.append(f"\n  evidence: {f.evidence}\n  remedy: {f.remedy}", "not bold red"))


def _show_comparisons(report: DoctorReport, decode: Decode) -> None:
    evidence, objective = report.check.evidence, type(report.config.objective).__name__
    _show_table(comparison_table(as_dict(report)))
    _show_table([["check", "covers", "showed"], *map(list, report.coverage())])
    if clip := evidence.clip:
        shares = f"{clip.tokens:.2%} of tokens, {clip.sequences:.2%} of sequences"
        console.print(Text(f"noise alone would clip {shares} ({objective})"))
    for r in token_table(report, decode, most=1):
        says = f"engine {r['rollout_logprob']:.4f}, trainer {r['trainer_logprob']:.4f}, d {r['d']:+.1e} nats"
        console.print(Text(f"worst token: {r['token']!r} after {r['context']!r}: {says}"))
    for note in evidence.notes:
        console.print(Text(f"not covered: {note}", "yellow"))


def _show_table(rows: list[list[str]]) -> None:
    """Print rows, the first as head. Columns that do not fit go to another table with the same first column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    parts = [[0]]
    for i in range(1, len(widths)):
        if sum(min(WRAPPED, widths[j]) + 3 for j in [*parts[-1], i]) >= console.width:
            parts.append([0])
        parts[-1].append(i)
    for part in parts:
        table = Table()
        for i in part:
            table.add_column(Text(rows[0][i]), no_wrap=widths[i] <= WRAPPED)
        for row in rows[1:]:
            table.add_row(*(Text(row[i]) for i in part))
        console.print(table, soft_wrap=False)


def save(report: DoctorReport, folder: Path, decode: Decode) -> None:
    """Write doctor.json and doctor.html."""
    data = as_dict(report)
    write_json(folder / "doctor.json", data)
    html = page(data, columns(report), comparison_table(data), token_table(report, decode, most=15))
    (folder / "doctor.html").write_text(html, encoding="utf-8")


async def write(report: DoctorReport, folder: Path, decode: Decode, tracker: RunTracker, version: int) -> None:
    """Save a run's report in a thread, and show its tokens in the trackers. What cannot be written is an alert."""
    try:
        await asyncio.to_thread(save, report, folder, decode)
    except Exception as error:  # a full disk, or a plot that cannot be drawn
        text = f"{type(error).__name__}: {shortened(str(error), 300)}. What it found is printed above."
        tracker.alert(version, "the doctor's report cannot be written", text)
    tracker.table("doctor", token_table(report, decode))
