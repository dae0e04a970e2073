"""Where do a run's numbers go? Files in its folder, the terminal, and trackers such as Weights & Biases."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl.config import TrackingConfig
from rl.loop.estimates import Problems
from rl.parity.watch import Alert
from rl.protocols import Tracker
from rl.typed import shortened
from rl.types import Trajectory
from trainer.runs.files import Rows
from trainer.runs.problems import rows_of
from trainer.tracking.terminal import alert_line
from trainer.tracking.wandb_run import open_wandb


@dataclass(kw_only=True)
class RunTracker:
    """`rl.protocols.Tracker` that writes files, and passes everything on to `trackers`.

    `close` may be called at any moment and leaves readable files. A resumed run brings its `history` and its
    `wandb_id`, and its files keep what they hold. A full disk, or a tracker that fails, is an alert and ends no run.
    """

    folder: Path
    config: TrackingConfig
    name: str
    settings: dict[str, Any]
    show: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    watch: Callable[[dict[str, float]], list[Alert]] = lambda metrics: []
    """Gives the alerts of each step."""
    alerts: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    wandb_id: str | None = None
    trackers: list[Tracker] = field(default_factory=list)
    """W&B joins them where `config` asks for it."""
    _full: set[str] = field(default_factory=set)
    """Files that could not be written, each of which was reported."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier = self.folder / "alerts.jsonl"
        self.alerts += [json.loads(line) for line in earlier.read_text().splitlines()] if earlier.exists() else []
        self.files = {name: self._open(name) for name in ("metrics", "samples")}
        for row in self.history:
            self.watch(row)  # it must not repeat earlier alerts
        step = int(self.history[-1]["step"]) if self.history else 0
        wandb, note = open_wandb(
            self.config,
            folder=self.folder,
            name=self.name,
            settings=self.settings,
            resume_id=self.wandb_id,
            step=step,
        )
        if wandb is not None:
            self.wandb_id = wandb.run.id
            self.trackers = [*self.trackers, wandb]
        if note:
            self.alert(step, "W&B is not online", note)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record one step everywhere. A NaN is written as null, which JSON can hold."""
        row = {"step": float(step), **metrics}
        self.history.append(row)
        self._write("metrics", row, step)
        self._tell(step, lambda tracker: tracker.log(step, metrics))
        self.show(step, metrics)
        for alert in self.watch(metrics):
            self.alert(step, alert.title, alert.text)

    def alert(self, step: int, title: str, text: str) -> None:
        """Show the user what needs attention: on the terminal, in alerts.jsonl, and in every tracker."""
        row = {"step": step, "title": title, "text": text}
        self.alerts.append(row)
        alert_line(step, title, text)
        self._write("alerts", row, step)
        self._tell(step, lambda tracker: tracker.alert(step, title, text))

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Show rows, which have the same keys, as a table in every tracker; no file is written."""
        self._tell(int(self.history[-1]["step"]) if self.history else 0, lambda tracker: tracker.table(name, rows))

    def samples(self, step: int, trajectories: list[Trajectory], decode: Callable[[list[int]], str]) -> None:
        """Keep a few trajectories as text; all of them when step is -1 (set aside as broken)."""
        kept = trajectories if step < 0 else trajectories[: self.config.samples_per_step]
        for t in kept:
            # What an episode read between its turns stays between them.
            first = t.mask.index(True) if True in t.mask else len(t.mask)
            prompt, reply = t.token_ids[:first], t.token_ids[first:]
            row = {
                "step": step,
                "prompt_ordinal": t.group,
                "prompt": decode(prompt),
                "reply": decode(reply),
                "reward": t.reward,
                "finish_reason": t.finish_reason,
                "versions": sorted({v for v, m in zip(t.versions, t.mask, strict=True) if m}),
            }
            if t.verdicts:
                row["verdicts"] = [{"judge": v.judge, "score": v.score, "raw": v.raw} for v in t.verdicts]
            if step < 0:
                sampled = [i for i, m in zip(t.token_ids, t.mask, strict=True) if m]
                row |= {"token_ids": sampled, "logprobs": [repr(x) for x in t.logprobs]}
            self._write("samples", row, step)
        self._tell(step, lambda tracker: tracker.samples(step, trajectories, decode))

    def problems(self, step: int, measured: Mapping[str, Problems]) -> None:
        """Keep the figures of every held-out problem, for comparisons."""
        for row in rows_of(step, measured):
            self._write("evaluations", row, step)

    def write_waiting(self) -> None:
        """Write the rows that waited for space, before anything larger takes it."""
        for rows in self.files.values():
            with suppress(OSError):  # they wait on, and `close` reports them
                rows.write()

    def close(self, summary: dict[str, Any]) -> None:
        """Close every tracker with the summary, and the files."""
        step = int(self.history[-1]["step"]) if self.history else 0
        self._tell(step, lambda tracker: tracker.close(summary))
        for rows in self.files.values():
            try:
                rows.close()
            except OSError as error:
                alert_line(step, f"{rows.path.name} lacks its last rows", str(error))

    def _open(self, name: str) -> Rows:
        return Rows(self.folder / f"{name}.jsonl")

    def _write(self, name: str, row: dict[str, Any], step: int) -> None:
        """Append a row to a file. The first one of a file that cannot be written is an alert."""
        if name not in self.files:
            self.files[name] = self._open(name)
        try:
            self.files[name].append(row)
        except OSError as error:
            if name not in self._full:
                self._full.add(name)
                text = f"{error}. Its rows are kept in memory, and written when there is space again."
                self.alert(step, f"{name}.jsonl cannot be written", text)

    def _tell(self, step: int, call: Callable[[Tracker], None]) -> None:
        """Call every tracker. One that fails is left out from then on."""
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as error:  # a tracker's own errors are of any kind, and none is worth a run
                self.trackers.remove(tracker)
                text = f"{type(error).__name__}: {shortened(str(error), 300)}. The files in the run's folder are whole."
                self.alert(step, f"{type(tracker).__name__} takes no more metrics", text)
