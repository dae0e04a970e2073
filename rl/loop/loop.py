"""The loop: sample -> score -> batch -> learn -> publish, with bounded staleness and a deadline for every wait."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from statistics import fmean

from rl.batch import collate
from rl.config import Config
from rl.episodes.rows import first_rows
from rl.errors import first_error
from rl.judges.desk import judge_metrics
from rl.loop.admission import Admission
from rl.loop.groups import Groups, Left, Tally
from rl.loop.ledger import Moved
from rl.loop.players import Player, Replies, Score
from rl.loop.progress import Progress, progress_of
from rl.loop.step_metrics import (
    StepTimes,
    batch_metrics,
    ledger_metrics,
    queue_metrics,
    sync_metrics,
    timing_metrics,
    trainer_speed,
)
from rl.protocols import Learner, Rollouts, Tracker
from rl.rewards.score import score_in_time
from rl.types import Prompt, Trajectory

Evaluate = Callable[[int], Awaitable[dict[str, float]] | None]
"""Evaluates the current policy after a step, and returns the metrics; None where nothing is to be evaluated then."""
Keep = Callable[[int, dict[str, float]], Awaitable[None]]
Save = Callable[[Progress], Awaitable[None]]


async def no_checkpoint(progress: Progress) -> None:
    """A checkpoint for a loop that needs none."""


async def nothing_kept(step: int, metrics: dict[str, float]) -> None:
    """A model that need not be kept."""


@dataclass(kw_only=True)
class Loop:
    """One run. `admission.version` counts published updates: after step k the engines serve version k."""

    config: Config
    rollouts: Rollouts
    learner: Learner
    prompts: Iterator[Prompt]
    """The whole stream of the run, also when it resumes: the loop skips prompts that have reached an end."""
    decode: Callable[..., str]
    tracker: Tracker
    evaluate: Evaluate = lambda step: None
    on_samples: Callable[[int, list[Trajectory]], None] = lambda step, trajectories: None
    """Called with the trajectories of each step, and with step -1 for groups whose log-probabilities are not finite."""
    # Both hear of every group, for the record and the timeline of a run.
    on_left: Left = lambda ordinal, end, prompt, rows, error: None
    on_move: Moved = lambda ordinal, state: None
    data_metrics: Callable[[], dict[str, float]] = dict
    """Metrics of the data that the stream has read so far, logged with every step."""
    score: Score = score_in_time
    player: Player | None = None
    """Makes the groups. None: single replies with `config.reward`."""
    progress: Progress = field(default_factory=Progress)
    """Where to resume; the default starts at step 1."""
    save: Save = no_checkpoint
    """Makes a checkpoint of this progress and of the current learner; called between two steps."""
    keep: Keep = nothing_kept
    """Called with the step and the metrics of an evaluation, while the learner holds the model that has them."""
    groups: Groups = field(init=False)
    trained_tokens: int = field(init=False)
    _owes_evaluation: bool = field(init=False)
    _saved: int = field(init=False)
    """The step of the last checkpoint."""
    _accounted: float = field(init=False, default=0.0)
    """Up to this time every second of the run is in a metric, less what `timing_s/between_steps` will have."""

    def __post_init__(self) -> None:
        c, p = self.config, self.progress
        ledger = p.ledger()
        ledger.moved = self.on_move
        self.groups = Groups(
            config=c,
            player=self.player or Replies(config=c, rollouts=self.rollouts, decode=self.decode, score=self.score),
            prompts=p.remaining(self.prompts),
            set_aside=lambda group: self.on_samples(-1, group),
            admission=Admission(
                prompts_per_step=c.prompts_per_step,
                max_staleness=c.max_staleness,
                steps=c.steps,
                late=c.late_groups,
                version=p.version,
                ledger=ledger,
            ),
            left=self.on_left,
        )
        self.trained_tokens, self._owes_evaluation, self._saved = p.trained_tokens, p.owes_evaluation, p.version

    @property
    def admission(self) -> Admission:
        """The state of every prompt, and the current weight version."""
        return self.groups.admission

    @property
    def done(self) -> bool:
        """Whether every step was made, and every evaluation."""
        return self.admission.version == self.config.steps and not self._owes_evaluation

    async def run(self) -> None:
        """Train up to `config.steps` steps, or until `stop`; `done` is True in the first case. The failure of any task
        ends the run with the error of that task."""
        c = self.config
        self._accounted = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as tasks:
                admitting = tasks.create_task(self.groups.admit(tasks), name="admit prompts")
                if self._owes_evaluation:  # beside the first groups, which are sampled on the same weights
                    version = self.admission.version
                    metrics = await self._evaluated(version)
                    # A run begins with a row of step 0, also where nothing is evaluated.
                    if not self._owes_evaluation and (metrics or not version):
                        self.tracker.log(version, metrics)
                while self.admission.version < c.steps and await self._step(self.admission.version + 1):
                    if c.save_every and self.admission.version % c.save_every == 0:
                        await self._save()
                admitting.cancel()
                if not self.done:
                    self.groups.cancel()
                if c.save_every:
                    await self._save()
        except BaseExceptionGroup as group:
            first = first_error(group)
            raise first from first.__cause__

    async def stop(self) -> None:
        """Let `run` return soon, with a checkpoint: the current learning step is finished, all else is given up."""
        await self.groups.stop()

    async def _step(self, step: int) -> bool:
        """One step; False when the run was stopped before the step could begin."""
        c, groups = self.config, self.groups
        began, busy = time.perf_counter(), groups.in_flight.seconds()
        trajectories = await groups.take(step)
        if trajectories is None:
            return False
        waited = time.perf_counter() - began
        metrics = batch_metrics(trajectories, self.admission.version, c.group_size)
        metrics |= queue_metrics(self.admission.ledger, groups.in_flight)
        metrics |= groups.tally.metrics(filters=bool(c.filters))
        if c.mask_truncated:
            metrics["response_length/masked_frac"] = fmean(not t.trained for t in first_rows(trajectories))
        groups.tally = Tally()

        learning = time.perf_counter()
        metrics |= await self.learner.step(collate(trajectories))
        learned = time.perf_counter() - learning
        metrics |= trainer_speed(metrics, learned)
        sync = await self.learner.publish(self.admission.version + 1)
        await groups.publish()

        tokens = sum(sum(t.mask) for t in trajectories)
        self.trained_tokens += tokens
        between, self._accounted = began - self._accounted, time.perf_counter()
        times = StepTimes(
            between=between,
            waited=waited,
            learned=learned,
            step=self._accounted - began,
            in_flight=groups.in_flight.seconds() - busy,
        )
        metrics |= self.data_metrics() | judge_metrics(c.judges) | ledger_metrics(self.admission.ledger)
        metrics |= sync_metrics(sync, self.admission.version)
        metrics |= timing_metrics(tokens, times)
        self.on_samples(step, trajectories)
        metrics |= await self._evaluated(step)
        self.tracker.log(step, metrics)
        return True

    async def _evaluated(self, step: int) -> dict[str, float]:
        """The metrics of an evaluation that is due; empty, and the evaluation owed, if the run is stopped meanwhile."""
        if (due := self.evaluate(step)) is None:
            self._owes_evaluation = False
            return {}
        began = time.perf_counter()
        evaluating = asyncio.ensure_future(due)
        stopping = asyncio.ensure_future(self.groups.stopping.wait())
        try:
            await asyncio.wait({evaluating, stopping}, return_when=asyncio.FIRST_COMPLETED)
            self._owes_evaluation = not evaluating.done()
        finally:
            evaluating.cancel()
            stopping.cancel()
        if self._owes_evaluation:
            return {}
        seconds = time.perf_counter() - began
        self._accounted += seconds
        metrics = evaluating.result() and evaluating.result() | {"timing_s/evaluate": seconds}
        await self.keep(step, metrics)
        return metrics

    async def _save(self) -> None:
        if self._saved == self.admission.version:
            return
        now = self.admission
        await self.save(progress_of(now.version, now.ledger, self.trained_tokens, self._owes_evaluation))
        self._saved = now.version
