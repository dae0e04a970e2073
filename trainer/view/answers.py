"""What does the page ask for, and what does it get? JSON by path; an export holds the same answers."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from trainer.record import timeline
from trainer.record.lines import read_lines
from trainer.record.table import SCALARS
from trainer.runs.files import without_nan
from trainer.view.compare import compared
from trainer.view.rollouts import Rollouts, compact

LIVE_S = 120.0
"""A run without a summary that wrote its metrics so many seconds ago is still going on."""


class Answers:
    """Those of one run, or of two that are compared."""

    def __init__(self, run: Path, other: Path | None = None) -> None:
        """Raises FileNotFoundError for a folder without a run."""
        for folder in filter(None, (run, other)):
            if not (folder / "metrics.jsonl").exists():
                raise FileNotFoundError(f"{folder} is no folder of a run: it has no metrics.jsonl")
        self.run, self.rollouts = run, Rollouts(run)
        self.other = None if other is None else (other, Rollouts(other))

    def answer(self, path: str, asked: Mapping[str, str]) -> Any:
        """The answer to a path with its query. Raises KeyError for one that does not exist, ValueError for a query that
        means nothing."""
        number = {name: int(value) for name, value in asked.items() if name in ("step", "group", "episode", "limit")}
        if path == "run":
            return without_nan(self._run())
        if path == "pulse":
            return [size(self.run / "metrics.jsonl"), size(self.run / "rollouts" / "manifest.jsonl")]
        if path == "rows":
            self.rollouts.refresh()
            falling = asked.get("falling") == "1"
            found = self.rollouts.find(
                number.get("step"),
                asked.get("where", ""),
                asked.get("sort", ""),
                falling=falling,
                limit=min(number.get("limit", 500), 5000),
            )
            return without_nan(found | {"columns": [*SCALARS]})
        if path == "sequences":
            self.rollouts.refresh()
            found = self.rollouts.sequences(number["step"], number["group"], number.get("episode"))
            return [compact(each) for each in found]
        if path == "time":
            return timeline.trace(timeline.read(self.run))["traceEvents"]
        if path == "doctor":
            return as_json(self.run / "doctor.json")
        if path == "compare" and self.other:
            other, rollouts = self.other
            return without_nan(compared(self.run, self.rollouts, other, rollouts))
        raise KeyError(path)

    def _run(self) -> dict[str, Any]:
        self.rollouts.refresh()
        # What a search over all steps needs, while the reader looks at the curves.
        Thread(target=self.rollouts.table, daemon=True).start()
        summary, metrics = as_json(self.run / "summary.json"), read_lines(self.run / "metrics.jsonl")
        names = list(dict.fromkeys(name for row in metrics for name in row))
        written = (self.run / "metrics.jsonl").stat().st_mtime
        return {
            "name": self.run.name,
            "live": summary is None and time.time() - written < LIVE_S,
            "summary": summary,
            "config": as_json(self.run / "config.json"),
            "metrics": {name: [row.get(name) for row in metrics] for name in names},
            "alerts": read_lines(self.run / "alerts.jsonl"),
            "steps": [[e.step, e.rows, e.tokens, e.kept, e.bytes] for e in self.rollouts.entries.values()],
            "compare": self.other is not None,
        }


def as_json(path: Path) -> Any:
    """The value of a file; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0
