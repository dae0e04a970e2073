"""May this run resume from that checkpoint, and what must its folder contain then?"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.loop.progress import Progress
from rl.types import Prompt
from trainer.runs import checkpoint
from trainer.runs.checkpoint import Checkpoint, CheckpointError
from trainer.runs.files import without_nan

FIXED = ("name", "seed", "prompts_per_step")
"""Settings that decide which prompt an ordinal is, and how many prompts make a step."""
HISTORY = "history.jsonl"


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A resumed run."""

    run: Path
    """Its folder."""
    checkpoint: Checkpoint
    progress: Progress
    history: list[dict[str, float]]
    """The rows of metrics.jsonl up to the checkpoint."""

    @property
    def flags(self) -> list[str]:
        """The command line of the run so far; the user need not repeat it."""
        return self.checkpoint.state["flags"]

    @property
    def learner(self) -> str:
        """Folder of the ranks' state."""
        return str((self.checkpoint.folder / "learner").resolve())

    def saved(self, name: str) -> Any:
        """Another value that `state_of` saved."""
        return self.checkpoint.state[name]

    def check(self, settings: dict[str, Any], steps: int) -> list[str]:
        """The settings that changed since the checkpoint, as text. Raises CheckpointError for a fixed one."""
        before, state = flat(self.saved("settings")), self.checkpoint.folder / checkpoint.STATE
        now = flat(json.loads(json.dumps(settings)))
        for name in FIXED:
            if before.get(name) != now[name]:
                raise CheckpointError(
                    f"{state} is of a run with {name}={before.get(name)!r}, and this one has {now[name]!r}: resume "
                    "with the recipe that wrote it, and leave that setting as it was"
                )
        if steps < self.progress.version:
            raise CheckpointError(f"{state} has done {self.progress.version} steps, and steps={steps}: ask for more")
        names = sorted((before.keys() | now.keys()) - {"output_dir"})
        return [
            f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in names if before.get(name) != now.get(name)
        ]

    def check_data(self, digest: str) -> None:
        """Raise CheckpointError when the training prompts changed."""
        if digest != self.saved("data"):
            raise CheckpointError(
                f"{self.checkpoint.folder / checkpoint.STATE} is of a run over other training prompts: `Config.data` "
                "must return what it returned then, in the same order. Else trained prompts cannot be distinguished "
                "from new ones"
            )

    def rewind(self) -> None:
        """Put the run's folder back to the checkpoint's step; later steps will be written again."""
        for folder in self.checkpoint.damaged:
            checkpoint.set_aside(folder)
        checkpoint.sweep(self.run)
        rows = "".join(json.dumps(without_nan(row)) + "\n" for row in self.history)
        _replace(self.run / "metrics.jsonl", rows)
        for name in ("samples.jsonl", "alerts.jsonl"):
            path = self.run / name
            if path.exists():
                kept = [line for line in path.read_text().splitlines() if _step(line) <= self.progress.version]
                _replace(path, "".join(line + "\n" for line in kept))


def resume(run: Path) -> Resumed:
    """The newest complete checkpoint of a run's folder. Raises CheckpointError when there is none."""
    found = checkpoint.latest(run)
    try:
        progress = Progress.from_json(found.state["progress"])
    except ValueError as error:
        raise CheckpointError(f"{found.folder / checkpoint.STATE} has an impossible ledger: {error}") from None
    lines = (found.folder / HISTORY).read_text().splitlines()
    history = [{k: math.nan if v is None else v for k, v in json.loads(line).items()} for line in lines]
    return Resumed(run=run, checkpoint=found, progress=progress, history=history)


def state_of(progress: Progress, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The part of a checkpoint that is not the learner's tensors."""
    return {"name": settings["name"], "progress": progress.to_json(), "settings": settings, **more}


def write_history(folder: Path, history: list[dict[str, float]]) -> None:
    """Write the metrics rows so far into a draft."""
    (folder / HISTORY).write_text("".join(json.dumps(without_nan(row)) + "\n" for row in history))


def data_digest(prompts: list[Prompt]) -> str:
    """Digest of the training prompts' tokens, in their order."""
    return hashlib.blake2b(json.dumps([p.token_ids for p in prompts]).encode(), digest_size=16).hexdigest()


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf  # an incomplete line of a killed writer


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
