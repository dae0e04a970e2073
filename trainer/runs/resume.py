"""May this run resume from that checkpoint, and what must its folder contain then?"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.loop.progress import Progress
from rl.typed import show
from rl.types import Prompt
from trainer.runs import best, checkpoint
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
        self._check_model(settings["model"])
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
            f"{name}: {show(before.get(name))} -> {show(now.get(name))}"
            for name in names
            if before.get(name) != now.get(name)
        ]

    def _check_model(self, model: str) -> None:
        """Raise CheckpointError for a relative path that was right where the run was started, and is not here."""
        cwd = self.checkpoint.state.get("cwd")
        if cwd and not Path(model).exists() and Path(cwd, model).exists() and Path(cwd) != Path.cwd():
            raise CheckpointError(
                f"model={model!r} is a path relative to {cwd}, where this run was started, and there is none in "
                f"{Path.cwd()}: resume it there, or with --model {Path(cwd, model)}"
            )

    def check_flags(self, flags: list[str]) -> None:
        """Raise CheckpointError where the run's own `--config` file is gone, and none is given now."""
        files = [after for flag, after in zip(self.flags, self.flags[1:], strict=False) if flag == "--config"]
        if files and "--config" not in " ".join(flags) and not Path(files[-1]).is_file():
            raise CheckpointError(
                f"the run was started with --config {files[-1]}, and there is no such file now: give --config again, "
                f"such as --config {self.run / 'config.json'}"
            )

    @property
    def data(self) -> dict[str, Any] | None:
        """The `Prepared.state` of the run so far; None in a checkpoint of an older version."""
        return self.checkpoint.state.get("prepared")

    def check_data(self, digest: str, now: Mapping[str, Any], *, accept: bool = False) -> list[str]:
        """What changed besides the settings, as text; `now` is a `fingerprint`.

        Raises CheckpointError for other training prompts, and for every change unless it is to be accepted.
        """
        before = self.checkpoint.state.get("fingerprint", {})
        state = self.checkpoint.folder / checkpoint.STATE
        if digest != self.saved("data") or before.get("size", now.get("size")) != now.get("size"):
            if before.get("texts") == now.get("texts", "") and before["size"] == now["size"]:
                raise CheckpointError(
                    f"{state} is of a run whose training prompts were the same texts and other tokens: put the model's "
                    "tokenizer and chat template, chat_template_kwargs and long_prompts back to what they were"
                )
            raise CheckpointError(
                f"{state} is of a run over other training prompts: `Config.data` must return what it returned then, in "
                "the same order. Else trained prompts cannot be distinguished from new ones"
            )
        found = changes(before, now)
        if found and not accept:
            raise CheckpointError(
                f"{state} is of a run with other {' and other '.join(found)}. Put back what it had, or accept the "
                "change with --changed-at-resume report"
            )
        return found

    def rewind(self) -> None:
        """Put the run's folder back to the checkpoint's step; later steps will be written again."""
        for folder in self.checkpoint.damaged:
            checkpoint.set_aside(folder)
        checkpoint.sweep(self.run)
        rows = "".join(json.dumps(without_nan(row)) + "\n" for row in self.history)
        _replace(self.run / "metrics.jsonl", rows)
        best.rewind(self.run, self.progress.version)
        for name in ("samples.jsonl", "alerts.jsonl", "evaluations.jsonl"):
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


def newest(wanted: Path) -> Path | None:
    """The last folder of a run (NAME, NAME-2, ...) that has a checkpoint; None where none has."""
    number = {folder: folder.name.removeprefix(f"{wanted.name}-") for folder in wanted.parent.glob(f"{wanted.name}-*")}
    again = sorted((int(n), folder) for folder, n in number.items() if n.isdigit())
    folders = [wanted, *(folder for _, folder in again)]
    return next((each for each in reversed(folders) if checkpoint.finished(each / "checkpoints")), None)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words. What only one of them has is not compared."""
    found = []
    if before.get("answers", now["answers"]) != now["answers"]:
        found.append("answers (`task`) of the training examples")
    for name, digest in before.get("evals", now["evals"]).items():
        if now["evals"].get(name) != digest:
            found.append(f"examples in the held-out set {name!r}")
    found += [f"held-out sets: {name!r} is new" for name in now["evals"].keys() - before.get("evals", now["evals"])]
    if before.get("means", means := now.get("means", {})) != means:
        found.append("weights of the means of held-out figures")
    code = before.get("code", {})
    found += [f"code of {name}" for name, digest in now["code"].items() if code.get(name, digest) != digest]
    if before.get("model") and now["model"] and before["model"] != now["model"]:
        found.append("files of the model (config or weights)")
    return found


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
