"""Where the numbers go: Weights & Biases, metrics.jsonl and the terminal, all under the same names."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl.config import TrackingConfig
from rl.parity.watch import Alert
from rl.types import Trajectory
from trainer.runs.files import without_nan
from trainer.tracking.terminal import alert_line
from trainer.tracking.wandb_run import wandb_mode


@dataclass(kw_only=True)
class RunTracker:
    """The record of one run; `close` may be called at any moment and leaves readable files.

    A run that goes on brings its `history` and its `wandb_id`, and what its files hold stays.
    """

    folder: Path
    config: TrackingConfig
    name: str
    settings: dict[str, Any]
    show: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    watch: Callable[[dict[str, float]], list[Alert]] = lambda metrics: []
    """Asked at each step what to alert the user to."""
    alerts: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    wandb_id: str | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics_file = (self.folder / "metrics.jsonl").open("a")
        self.samples_file = (self.folder / "samples.jsonl").open("a")
        told = self.folder / "alerts.jsonl"
        self.alerts += [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
        for row in self.history:
            self.watch(row)  # so that it knows what it has told already
        self.wandb: Any = None
        mode = wandb_mode(self.config)
        if mode != "disabled":
            import wandb

            self.wandb = wandb.init(
                project=self.config.project,
                name=self.name,
                dir=str(self.folder),
                config=self.settings,
                mode=mode,
                id=self.wandb_id,
                resume="allow" if self.wandb_id else None,
                settings=wandb.Settings(silent=True, console="off"),
            )
            self.wandb_id = self.wandb.id

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record one step everywhere. A NaN is written as null, which JSON can hold."""
        row = {"step": float(step), **metrics}
        self.history.append(row)
        self.metrics_file.write(json.dumps(without_nan(row)) + "\n")
        self.metrics_file.flush()
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)
        self.show(step, metrics)
        for alert in self.watch(metrics):
            self.alert(step, alert.title, alert.text)

    def alert(self, step: int, title: str, text: str) -> None:
        """Tell the user what needs a look: W&B sends it on when online; also alerts.jsonl and the terminal."""
        row = {"step": step, "title": title, "text": text}
        self.alerts.append(row)
        with (self.folder / "alerts.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        alert_line(step, title, text)
        if self.wandb is not None:
            self.wandb.alert(title=title, text=f"Step {step}: {text}", level="WARN")

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Show rows, which have the same keys, as a table of the W&B run; without W&B nothing."""
        if self.wandb is None or not rows:
            return
        import wandb

        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        # W&B drops what comes under an earlier step than the last, and without a step it would begin the next one.
        self.wandb.log({name: table}, step=int(self.history[-1]["step"]) if self.history else 0)

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

    def close(self, summary: dict[str, Any]) -> None:
        """Finish the W&B run with the summary's numbers, and close the files."""
        self.metrics_file.close()
        self.samples_file.close()
        if self.wandb is not None:
            self.wandb.summary.update({k: v for k, v in summary.items() if isinstance(v, int | float | str)})
            self.wandb.finish(exit_code=0 if summary.get("status") == "finished" else 1)
