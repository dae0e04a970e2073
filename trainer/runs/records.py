"""How is a step's batch recorded? One safetensors file: log-probabilities of both sides, before and after the step."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import rl.objectives
from rl.config import Config
from rl.objectives import Objective
from rl.protocols import SyncReport
from rl.types import Batch, PolicyOutput
from trainer.cluster.remote import RemoteLearner

SCHEMA = "unison-batch/1"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One step: its batch, and the policy after it."""

    batch: Batch
    """`old_logprobs` and `values` are the trainer's before the step; values and reference where the run has them."""
    policy: PolicyOutput
    """The trainer's output after the step."""
    horizon: int
    objective: str
    """Name of the run's objective."""
    spec: str = ""
    """How to make it again (`spec_of`); its name alone in records of older runs."""


def spec_of(objective: Objective) -> str:
    """How to make an objective again, as `unison what-if` takes it: GRPO(clip_high=0.28), /mine.py:Mine(alpha=0.5)."""
    cls = type(objective)
    home = ""
    if not cls.__module__.startswith("rl."):
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        home = f"{Path(file).resolve() if file else cls.__module__}:"
    elif getattr(rl.objectives, cls.__name__, None) is not cls:
        home = f"{cls.__module__}:"
    kept = {f.name: getattr(objective, f.name) for f in fields(objective) if f.init}
    other = [f"{f.name}={kept[f.name]!r}" for f in fields(objective) if f.name in kept and kept[f.name] != f.default]
    return f"{home}{cls.__name__}" + (f"({', '.join(other)})" if other else "")


def save(record: Record, path: Path) -> None:
    """Write a record; any safetensors library can read it, and its header describes it."""
    tensors = {f.name: getattr(record.batch, f.name) for f in fields(Batch)}
    tensors |= {f"now.{f.name}": getattr(record.policy, f.name) for f in fields(PolicyOutput)}
    kept = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items() if t is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"schema": SCHEMA, "horizon": str(record.horizon), "objective": record.objective, "spec": record.spec}
    save_file(kept, path, metadata=header)


def load(path: Path) -> Record:
    """Read a record. Raises FileNotFoundError, and ValueError for a file of another kind or schema."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; `--record-batches 1` keeps every step in runs/NAME/batches/")
    foreign = f"{path} is no recorded batch ({SCHEMA}): `--record-batches 1` keeps every step in runs/NAME/batches/"
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError:
        raise ValueError(foreign) from None
    with file:
        header = file.metadata() or {}
        if header.get("schema") != SCHEMA:
            raise ValueError(foreign)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    now = {f.name: tensors.pop(f"now.{f.name}", None) for f in fields(PolicyOutput)}
    return Record(
        batch=Batch(**tensors),
        policy=PolicyOutput(**now),
        horizon=int(header["horizon"]),
        objective=header["objective"],
        spec=header.get("spec") or header["objective"],
    )


class Recorder:
    """`rl.protocols.Learner` that records every n-th step; each record costs two forward passes, and one of the
    reference where there is one."""

    def __init__(
        self, learner: RemoteLearner, folder: Path, config: Config, alert: Callable[[int, str, str], None]
    ) -> None:
        """`alert` reports the first record that cannot be written, with step, title and text."""
        self.learner, self.folder, self.config, self.alert = learner, folder, config, alert
        self.failed = False
        """Whether that was reported."""
        self.steps = learner.version
        """Steps so far, including those before a resume."""

    async def step(self, batch: Batch) -> dict[str, float]:
        """Train on a step's batch, and record it if it is an n-th one."""
        self.steps += 1
        if self.steps % self.config.record_batches:
            return await self.learner.step(batch)
        async with self.learner.published:
            # Under the lock of publishing: a restarted engine asks the ranks for weights.
            before = await self.learner.answer(batch)
            reference = await self.learner.reference_logprobs(batch)
        metrics = await self.learner.step(batch)
        record = Record(
            batch=replace(batch, old_logprobs=before.logprobs, values=before.values, ref_logprobs=reference),
            policy=await self.learner.answer(batch),
            horizon=self.config.horizon,
            objective=type(self.config.objective).__name__,
            spec=spec_of(self.config.objective),
        )
        path = self.folder / f"step-{self.steps}.safetensors"
        try:
            save(record, path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            if not self.failed:
                self.alert(self.steps, "the batch could not be recorded", f"{error}. Training continues.")
            self.failed = True
        return metrics

    async def publish(self, version: int) -> SyncReport:
        """Publish through the learner."""
        return await self.learner.publish(version)


def recorded(
    learner: RemoteLearner, folder: Path, config: Config, alert: Callable[[int, str, str], None]
) -> RemoteLearner | Recorder:
    """The learner, with a record of its steps in the run's `folder` where the config asks for one."""
    return Recorder(learner, folder / "batches", config, alert) if config.record_batches else learner
