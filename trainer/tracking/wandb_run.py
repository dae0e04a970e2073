"""The run in Weights & Biases: when it is on, and what it gets."""

import netrc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl.config import TrackingConfig
from rl.types import Trajectory


def wandb_mode(config: TrackingConfig) -> str:
    """W&B's own word for the mode: online when asked for, or when a key is at hand. It never asks for a key."""
    if config.wandb != "auto":
        return {"off": "disabled"}.get(config.wandb, config.wandb)
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    try:
        known = "api.wandb.ai" in netrc.netrc().hosts
    except (FileNotFoundError, netrc.NetrcParseError):
        known = False
    return "online" if known or os.environ.get("WANDB_API_KEY") else "offline"


class WandbRun:
    """`rl.protocols.Tracker` of one W&B run."""

    def __init__(self, run: Any, step: int = 0) -> None:
        """`run` is what `wandb.init` returns; `step` is the last step that it has."""
        self.run, self.step = run, step

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record one step."""
        self.step = step
        self.run.log(metrics, step=step)

    def alert(self, step: int, title: str, text: str) -> None:
        """Raise a W&B alert, which W&B sends to the user when it is online."""
        self.run.alert(title=title, text=f"Step {step}: {text}", level="WARN")

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Show rows, which have the same keys, as a table under the last step."""
        if not rows:
            return
        import wandb

        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        # W&B drops what comes under an earlier step than the last, and without a step it would begin the next one.
        self.run.log({name: table}, step=self.step)

    def samples(self, step: int, trajectories: list[Trajectory], decode: Callable[[list[int]], str]) -> None:
        """Nothing: samples are kept in samples.jsonl alone."""

    def close(self, summary: dict[str, Any]) -> None:
        """Finish the run with the summary's numbers and texts."""
        self.run.summary.update({k: v for k, v in summary.items() if isinstance(v, int | float | str)})
        self.run.finish(exit_code=0 if summary.get("status") == "finished" else 1)


def open_wandb(
    config: TrackingConfig, *, folder: Path, name: str, settings: dict[str, Any], resume_id: str | None, step: int
) -> WandbRun | None:
    """Begin a W&B run, or continue the one with `resume_id` after `step`; None where W&B is off."""
    mode = wandb_mode(config)
    if mode == "disabled":
        return None
    import wandb

    run = wandb.init(
        project=config.project,
        name=name,
        dir=str(folder),
        config=settings,
        mode=mode,
        id=resume_id,
        resume="allow" if resume_id else None,
        settings=wandb.Settings(silent=True, console="off"),
    )
    return WandbRun(run, step)
