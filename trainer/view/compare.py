"""How do two runs differ? Their settings, the step at which their curves part, and their replies to one prompt."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.record.writer import tokens
from trainer.runs.reading import Reading
from trainer.runs.resume import flat
from trainer.view.rollouts import Rollouts, compact

APART = 3.0
"""Standard errors by which two figures differ when they have parted."""


def compared(a: Path, rollouts_a: Rollouts, b: Path, rollouts_b: Rollouts) -> dict[str, Any]:
    """The settings that differ, where each curve parts, and the last prompt that both were given."""
    rollouts_b.refresh()
    runs = [Reading(a), Reading(b)]
    settings, rows = [flat(run.settings) for run in runs], [_metrics(run) for run in runs]
    names = sorted(settings[0].keys() | settings[1].keys())
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


def _metrics(run: Reading) -> list[dict[str, Any]]:
    run.refresh()
    episodes = (run.settings.get("prompts_per_step") or 0) * (run.settings.get("group_size") or 0)
    return [{n: x for n, x in row.items() if x is not None} | {"episodes": episodes} for row in run.rows]


def _prompt(a: Rollouts, b: Rollouts) -> list[list[dict[str, Any]]] | None:
    """The rows of each run for the last prompt that both have, newest step first."""
    others = dict(reversed([*_prompts(b)]))
    for ids, row in _prompts(a):
        if ids and ids in others:
            pairs = ((a, row), (b, others[ids]))
            return [[compact(s) for s in r.sequences(one["step"], one["group"])] for r, one in pairs]
    return None


def _prompts(rollouts: Rollouts) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
    """The prompt of each group, and one of its rows, newest of the last 20 steps first."""
    for step in sorted(rollouts.entries, reverse=True)[:20]:
        first = {row["group"]: row for row in reversed(rollouts.table({step}).to_pylist())}
        rows = [*reversed(first.values())]
        read = tokens(rollouts.folder / rollouts.entries[step].file, [row["place"] for row in rows])
        for row, lists in zip(rows, read, strict=True):
            yield tuple(lists["ids"][: row["prompt_tokens"]].tolist()), row
