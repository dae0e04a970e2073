"""Which figures has each held-out problem? Rows of evaluations.jsonl, one for each set and evaluation."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rl.loop.estimates import Problems

PROBLEMS = "evaluations.jsonl"


def rows_of(step: int, measured: Mapping[str, Problems]) -> Iterator[dict[str, Any]]:
    """The rows of an evaluation after a step."""
    for name, problems in measured.items():
        yield {"step": step, "set": name, "problems": dict(problems)}


def problems_at(folder: Path, step: int) -> dict[str, Problems]:
    """The figures of the problems by set, as they were after a step; no set that was not evaluated then."""
    rows = [row for row in _rows(folder) if row["step"] == step]
    return {row["set"]: {int(i): each for i, each in row["problems"].items()} for row in rows}


def last_problems(folder: Path) -> dict[str, Problems]:
    """Those of the last evaluation in a folder. Raises FileNotFoundError, with the remedy, when there is none."""
    path, rows = folder / PROBLEMS, _rows(folder)
    if not rows:
        raise FileNotFoundError(f"there is no evaluation in {path}: give the folder of a run or of an evaluation")
    return problems_at(folder, max(row["step"] for row in rows))


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / PROBLEMS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
