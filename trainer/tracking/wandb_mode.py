"""The run in Weights & Biases: when it is on, and what it gets."""

import netrc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from rl.config import TrackingConfig
from rl.typed import shortened
from rl.types import Trajectory

REACH_S, INSIST_S = 10.0, 60.0
"""Seconds in which W&B's server must answer before the run goes offline, or ends because it must be online."""
FINISH_S = 120.0
"""Seconds in which the last rows must arrive at the server."""


def wandb_mode(config: TrackingConfig) -> str:
    """W&B's own word for the mode: online when asked for, or when a key is at hand. It never asks for a key.

    Raises ValueError for a WANDB_MODE that does not exist.
    """
    if config.wandb != "auto":
        return {"off": "disabled"}.get(config.wandb, config.wandb)
    wanted = os.environ.get("WANDB_MODE")
    if wanted not in (None, "", "online", "offline", "disabled"):
        raise ValueError(f"WANDB_MODE={wanted!r} is not one of online, offline, disabled")
    return wanted or ("online" if os.environ.get("WANDB_API_KEY") or _key_in_netrc()[0] else "offline")


def _key_in_netrc() -> tuple[bool, str]:
    """Whether the file of logins has a key of W&B's server, and why it cannot be read where that is so."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    file = os.environ.get("NETRC") or "~/.netrc"
    try:
        return host in netrc.netrc(Path(file).expanduser()).hosts, ""
    except FileNotFoundError:
        return False, ""
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError, RuntimeError) as error:
        return False, f"{file} cannot be read ({error}), so it is not known whether you are logged in"


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
) -> tuple[WandbRun | None, str]:
    """Begin a W&B run, or continue the one with `resume_id` after `step`; None where W&B is off.

    The text is what the user must know: why the run is not where `wandb="auto"` would have it. Raises ValueError where
    W&B must be online, and is not.
    """
    mode = wandb_mode(config)
    if mode == "disabled":
        return None, ""
    insists = "online" in (config.wandb, os.environ.get("WANDB_MODE"))

    def begin(mode: str) -> WandbRun:
        import wandb

        run = wandb.init(
            project=config.project,
            name=name,
            dir=str(folder),
            config=settings,
            mode=mode,
            id=resume_id,
            resume="allow" if resume_id else None,
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INSIST_S if insists else REACH_S,
                finish_timeout=FINISH_S,
                finish_timeout_raises=True,
            ),
        )
        return WandbRun(run, step)

    asked = config.wandb if config.wandb != "auto" else os.environ.get("WANDB_MODE")
    note = "" if asked else _key_in_netrc()[1]
    try:
        return begin(mode), note
    except Exception as error:  # W&B raises errors of its own, of its client and of the system, and none may end a run
        why = _in_a_line(error)
        if insists:
            raise ValueError(
                f"W&B must be online (tracking.wandb=online, or WANDB_MODE), and it is not: {why}. Use "
                "--tracking.wandb auto, which goes offline, or offline"
            ) from error
    if mode == "online":
        try:
            run = begin("offline")
        except Exception as error:
            why += f"; and offline, {_in_a_line(error)}"
        else:
            later = f"wandb sync {folder}/wandb/offline-run-*"
            return run, f"the server did not take the run ({why}). Send it later: {later}"
    return None, f"no W&B run could be begun ({why}). Metrics are in {folder}/metrics.jsonl"


def _in_a_line(error: Exception) -> str:
    """An error of W&B, without its advice about settings that are not ours."""
    return f"{type(error).__name__}: {shortened(str(error).partition(chr(10))[0], 300)}"
