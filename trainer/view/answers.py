"""What does the page ask for, and what does it get? JSON by path; an export holds the same answers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.record import timeline
from trainer.runs.files import without_nan
from trainer.runs.reading import Reading
from trainer.view.compare import compared
from trainer.view.rollouts import Rollouts, compact


class Answers:
    """Those of one run, or of two that are compared."""

    def __init__(self, run: Path, other: Path | None = None) -> None:
        """Raises ValueError for a folder without a run."""
        for folder in filter(None, (run, other)):
            Reading(folder)
        self.run, self.rollouts = run, Rollouts(run)
        self.other = None if other is None else (other, Rollouts(other))

    def answer(self, path: str, asked: Mapping[str, str]) -> Any:
        """The answer to a path with its query. Raises KeyError for one that does not exist, ValueError for a query that
        means nothing."""
        number = {name: int(value) for name, value in asked.items() if name in ("step", "group", "episode", "limit")}
        if path == "pulse":
            files = (self.run / "metrics.jsonl", self.rollouts.folder, self.run / "summary.json")
            return [file.stat().st_mtime_ns if file.exists() else 0 for file in files]
        self.rollouts.refresh()
        if path == "run":
            return without_nan(self._run())
        if path == "rows":
            where, sort, falling = asked.get("where", ""), asked.get("sort", ""), asked.get("falling") == "1"
            limit = min(number.get("limit", 500), 5000)
            return without_nan(self.rollouts.find(number.get("step"), where, sort, falling=falling, limit=limit))
        if path == "sequences":
            found = self.rollouts.sequences(number["step"], number["group"], number.get("episode"))
            return [compact(each) for each in found]
        if path == "time":
            return timeline.trace(timeline.read(self.run))["traceEvents"]
        if path == "doctor":
            report = self.run / "doctor.json"
            return json.loads(report.read_text(encoding="utf-8")) if report.exists() else None
        if path == "compare" and self.other:
            other, rollouts = self.other
            return without_nan(compared(self.run, self.rollouts, other, rollouts))
        raise KeyError(path)

    def _run(self) -> dict[str, Any]:
        run = Reading(self.run)
        run.refresh()
        names = dict.fromkeys(name for row in run.rows for name in row)
        return {
            "name": self.run.name,
            "status": run.status,
            "summary": run.summary,
            "metrics": {name: [row.get(name) for row in run.rows] for name in names},
            "alerts": run.alerts.rows,
            "steps": [[e.step, e.bytes] for e in self.rollouts.entries.values()],
            "compare": self.other is not None,
        }
