"""How do two runs differ? Their settings, the step at which their curves part, and their replies to one prompt."""

import json
import math
from pathlib import Path
from typing import Any

from trainer.record.lines import read_lines
from trainer.record.writer import tokens
from trainer.runs.resume import flat
from trainer.view.rollouts import Rollouts, compact

APART = 3.0
"""Standard errors by which two figures differ when they have parted."""


def compared(a: Path, rollouts_a: Rollouts, b: Path, rollouts_b: Rollouts) -> dict[str, Any]:
    """The settings that differ, where each curve parts, and the last prompt that both were given."""
    rollouts_a.refresh()
    rollouts_b.refresh()
    settings = [flat(json.loads((run / "config.json").read_text())) for run in (a, b)]
    names = sorted(settings[0].keys() | settings[1].keys())
    rows = [_metrics(run, config) for run, config in zip((a, b), settings, strict=True)]
    return {
        "names": [str(a), str(b)],
        "settings": [[n, *(s.get(n) for s in settings)] for n in names if settings[0].get(n) != settings[1].get(n)],
        "parted": parted(*rows),
        "curves": {n: [[[row["step"], row[n]] for row in run if n in row] for run in rows] for n in _curves(*rows)},
        "prompt": _prompt(rollouts_a, rollouts_b),
    }


def parted(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, int | None]:
    """The first step at which each figure with a standard error differs by more than APART of them; None: at none."""
    found: dict[str, int | None] = {}
    others = {row["step"]: row for row in b}
    for name in _curves(a, b):
        found[name] = None
        for row in a:
            other = others.get(row["step"], {})
            if None in (row.get(name), other.get(name)) or None in (error(row, name), error(other, name)):
                continue
            between = math.hypot(error(row, name) or 0.0, error(other, name) or 0.0)
            if abs(row[name] - other[name]) > APART * between:
                found[name] = int(row["step"])
                break
    return found


def error(row: dict[str, Any], name: str) -> float | None:
    """The standard error of a figure. That of the mean reward takes the samples of a step as independent."""
    if name == "reward/mean" and row.get("reward/std") is not None and row.get("episodes"):
        return row["reward/std"] / math.sqrt(row["episodes"])
    return row.get(f"{name}_se")


def _curves(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[str]:
    first, second = ({n for row in rows for n in row} for rows in (a, b))
    return [n for n in sorted(first & second) if n == "reward/mean" or f"{n}_se" in first & second]


def _metrics(run: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    episodes = (config.get("prompts_per_step") or 0) * (config.get("group_size") or 0)
    return [row | {"episodes": episodes} for row in read_lines(run / "metrics.jsonl")]


def _prompt(a: Rollouts, b: Rollouts) -> list[list[dict[str, Any]]] | None:
    """The rows of each run for the last prompt that both have, newest step first."""
    seen: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for step in sorted(b.entries, reverse=True)[:20]:
        for row in b.table(step).filter(_first_members(b, step)).to_pylist():
            ids = tokens(b.folder / b.entries[step].file, row["place"])["ids"][: row["prompt_tokens"]]
            seen.setdefault(tuple(ids), row)
    for step in sorted(a.entries, reverse=True)[:20]:
        for row in a.table(step).filter(_first_members(a, step)).to_pylist():
            ids = tokens(a.folder / a.entries[step].file, row["place"])["ids"][: row["prompt_tokens"]]
            other: Any = seen.get(tuple(ids))
            if ids and other:
                pairs = ((a, row), (b, other))
                return [[compact(s) for s in r.sequences(one["step"], one["group"])] for r, one in pairs]
    return None


def _first_members(rollouts: Rollouts, step: int) -> Any:
    table, seen = rollouts.table(step), set[int]()
    return [not (g in seen or seen.add(g)) for g in table["group"].to_pylist()]
