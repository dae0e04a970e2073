"""Where do a run's numbers go? Files in its folder, the terminal, and trackers such as Weights & Biases."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl.config import TrackingConfig
from rl.parity.watch import Alert
from rl.protocols import Tracker
from rl.types import Trajectory
from trainer.runs.files import without_nan
from trainer.tracking.terminal import alert_line
from trainer.tracking.wandb_run import open_wandb


@dataclass(kw_only=True)
class RunTracker:
    """`rl.protocols.Tracker` that writes files, and passes everything on to `trackers`.

    `close` may be called at any moment and leaves readable files. A resumed run brings its `history` and its
    `wandb_id`, and its files keep what they hold.
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

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics_file = (self.folder / "metrics.jsonl").open("a")
        self.samples_file = (self.folder / "samples.jsonl").open("a")
        earlier = self.folder / "alerts.jsonl"
        self.alerts += [json.loads(line) for line in earlier.read_text().splitlines()] if earlier.exists() else []
        for row in self.history:
            self.watch(row)  # it must not repeat earlier alerts
        wandb = open_wandb(
            self.config,
            folder=self.folder,
            name=self.name,
            settings=self.settings,
            resume_id=self.wandb_id,
            step=int(self.history[-1]["step"]) if self.history else 0,
        )
        if wandb is not None:
            self.wandb_id = wandb.run.id
            self.trackers = [*self.trackers, wandb]

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record one step everywhere. A NaN is written as null, which JSON can hold."""
        row = {"step": float(step), **metrics}
        self.history.append(row)
        self.metrics_file.write(json.dumps(without_nan(row)) + "\n")
        self.metrics_file.flush()
        for tracker in self.trackers:
            tracker.log(step, metrics)
        self.show(step, metrics)
        for alert in self.watch(metrics):
            self.alert(step, alert.title, alert.text)

    def alert(self, step: int, title: str, text: str) -> None:
        """Show the user what needs attention: on the terminal, in alerts.jsonl, and in every tracker."""
        row = {"step": step, "title": title, "text": text}
        self.alerts.append(row)
        with (self.folder / "alerts.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        alert_line(step, title, text)
        for tracker in self.trackers:
            tracker.alert(step, title, text)

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Show rows, which have the same keys, as a table in every tracker; no file is written."""
        for tracker in self.trackers:
            tracker.table(name, rows)

    def samples(self, step: int, trajectories: list[Trajectory], decode: Callable[[list[int]], str]) -> None:
        """Keep a few trajectories as text; all of them when step is -1 (set aside as broken)."""
        kept = trajectories if step < 0 else trajectories[: self.config.samples_per_step]
        for t in kept:
            prompt = [i for i, m in zip(t.token_ids, t.mask, strict=True) if not m]
            reply = [i for i, m in zip(t.token_ids, t.mask, strict=True) if m]
            row = {
                "step": step,
                "prompt_ordinal": t.group,
                "prompt": decode(prompt),
                "reply": decode(reply),
                "reward": t.reward,
                "finish_reason": t.finish_reason,
                "versions": sorted({v for v, m in zip(t.versions, t.mask, strict=True) if m}),
            }
            if step < 0:
                row |= {"token_ids": reply, "logprobs": [repr(x) for x in t.logprobs]}
            self.samples_file.write(json.dumps(row) + "\n")
        self.samples_file.flush()
        for tracker in self.trackers:
            tracker.samples(step, trajectories, decode)

    def close(self, summary: dict[str, Any]) -> None:
        """Close the files, and every tracker with the summary."""
        self.metrics_file.close()
        self.samples_file.close()
        for tracker in self.trackers:
            tracker.close(summary)
