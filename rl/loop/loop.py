"""The loop: sample -> score -> batch -> learn -> publish, with bounded staleness and no silent wait."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from statistics import fmean

from rl.batch import collate, trajectory
from rl.config import Config
from rl.filters import reason
from rl.loop.admission import Admission
from rl.loop.progress import Progress, progress_of
from rl.loop.step_metrics import batch_metrics, trainer_speed
from rl.loop.stream import sample_seed
from rl.protocols import EngineLost, Learner, Rollouts, StallError, Tracker
from rl.rewards.score import Reward, reply_to, score_in_time
from rl.types import Completion, Prompt, Reply, Trajectory

Evaluate = Callable[[], Awaitable[dict[str, float]]]
Score = Callable[[Reward, Reply, int, float], Awaitable[tuple[float, dict[str, float]]]]
"""`rl.rewards.score.score_in_time`, or what stands in for it."""
MAX_SCORING = 64
"""Rewards that are asked for at a time, each in a thread: many wait for a sandbox or a model, and do not compute."""
Save = Callable[[Progress], Awaitable[None]]


async def no_checkpoint(progress: Progress) -> None:
    """A checkpoint for a loop that needs none."""


@dataclass(kw_only=True)
class Loop:
    """One run. `admission.version` counts published updates, so that after step k the engines serve version k."""

    config: Config
    rollouts: Rollouts
    learner: Learner
    prompts: Iterator[Prompt]
    decode: Callable[..., str]
    tracker: Tracker
    evaluate: Evaluate
    on_samples: Callable[[int, list[Trajectory]], None] = lambda step, trajectories: None
    score: Score = score_in_time
    progress: Progress = field(default_factory=Progress)
    """Where to go on. `prompts` is the whole stream in any case; what has reached an end is skipped."""
    save: Save = no_checkpoint
    """Makes a checkpoint of this progress and of the learner as it is now; called between two steps."""
    trained_tokens: int = field(init=False)
    admission: Admission = field(init=False)
    _owes_evaluation: bool = field(init=False)
    _saved: int = field(init=False)
    """The step of the last checkpoint."""
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _ready: dict[int, list[Trajectory]] = field(default_factory=dict)
    _tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    _since: dict[int, float] = field(default_factory=dict)
    """When each group was admitted that is still being sampled or judged."""
    _busy: float = 0.0
    """Seconds in which some group was being sampled or judged, and when that last began."""
    _busy_since: float = 0.0
    _judged: list[float] = field(default_factory=list)
    """Mean rewards of the groups judged since the last step, kept or not."""
    _filtered: int = 0
    """How many of them the filters took."""
    _nonfinite: int = 0
    """Groups since the last step of which a log-probability was no number."""
    _judges: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_SCORING))
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def __post_init__(self) -> None:
        c = self.config
        p = self.progress
        self.admission = Admission(
            prompts_per_step=c.prompts_per_step,
            max_staleness=c.max_staleness,
            steps=c.steps,
            late=c.late_groups,
            version=p.version,
            ledger=p.ledger(),
        )
        self.prompts = p.remaining(self.prompts)
        self.trained_tokens, self._owes_evaluation, self._saved = p.trained_tokens, p.owes_evaluation, p.version

    @property
    def done(self) -> bool:
        """Whether every step was made, and every evaluation."""
        return self.admission.version == self.config.steps and not self._owes_evaluation

    async def run(self) -> None:
        """Train up to `config.steps` steps, or until `stop`; `done` says which it was. Any task's failure ends the run
        with that task's own error."""
        c = self.config
        try:
            async with asyncio.TaskGroup() as tasks:
                sampler = tasks.create_task(self._admit(tasks), name="admit prompts")
                if self._owes_evaluation and (metrics := await self._evaluated()):
                    self.tracker.log(self.admission.version, metrics)
                while self.admission.version < c.steps and await self._step(self.admission.version + 1):
                    if c.save_every and self.admission.version % c.save_every == 0:
                        await self._save()
                sampler.cancel()
                if not self.done:
                    for task in self._tasks.values():
                        task.cancel()
                if c.save_every:
                    await self._save()
        except BaseExceptionGroup as group:
            raise first_error(group) from None

    async def stop(self) -> None:
        """Let `run` return soon, with a checkpoint: a step that learns is finished, all else is given up."""
        async with self._changed:
            self._stop.set()
            self._changed.notify_all()

    async def _save(self) -> None:
        if self._saved == self.admission.version:
            return
        await self.save(
            progress_of(self.admission.version, self.admission.ledger, self.trained_tokens, self._owes_evaluation)
        )
        self._saved = self.admission.version

    async def _admit(self, tasks: asyncio.TaskGroup) -> None:
        """Start a group whenever the staleness bound has room for it."""
        while True:
            async with self._changed:
                await self._changed.wait_for(self.admission.room)
            prompt = next(self.prompts)
            self.admission.admit(prompt.ordinal)
            if not self._since:
                self._busy_since = now()
            self._since[prompt.ordinal] = now()
            task = tasks.create_task(self._group(prompt), name=f"sample prompt {prompt.ordinal}")
            self._tasks[prompt.ordinal] = task

    async def _group(self, prompt: Prompt) -> None:
        c, ordinal = self.config, prompt.ordinal
        completions = await self._sample(prompt)

        async def judged(completion: Completion) -> Trajectory:
            reply = reply_to(prompt, completion, self.decode)
            async with self._judges:
                reward, parts = await self.score(c.reward, reply, ordinal, c.deadlines.reward_s)
            return trajectory(prompt, completion, reward, parts)

        group = list(await asyncio.gather(*map(judged, completions)))
        async with self._changed:
            self._forget(ordinal)
            if not group:
                self.admission.move(ordinal, "failed(engine_lost)")
            elif all(math.isfinite(x) for t in group for x in t.logprobs):
                why = reason(c.filters, group)
                self.admission.move(ordinal, f"filtered({why})" if why else "ready")
                if not why:
                    self._ready[ordinal] = group
                self._count(group, filtered=bool(why))
            else:
                # Never replaced by a number that looks right: the group is set aside, counted, and another admitted.
                self.admission.move(ordinal, "filtered(nonfinite_logprobs)")
                self.on_samples(-1, group)
                self._nonfinite += 1
                if self._nonfinite > c.max_filtered * c.prompts_per_step:
                    raise StallError(
                        f"{self._nonfinite} groups since the last step have log-probabilities that are NaN or infinite "
                        f"(step -1 in samples.jsonl): weights of version {self.admission.version} are not to be "
                        "trusted. Look at rollout_corr/* and actor/* of the last steps; lower trainer.lr"
                    )
            self._changed.notify_all()

    def _count(self, group: list[Trajectory], *, filtered: bool) -> None:
        """Raise StallError when the filters leave too little: every group costs sampling, and no step would come."""
        c = self.config
        self._judged.append(fmean(t.reward for t in group))
        self._filtered += filtered
        if filtered and self._filtered > c.max_filtered * c.prompts_per_step:
            reasons = {s: n for s, n in self.admission.ledger.summary().items() if s.startswith("filtered") and n}
            raise StallError(
                f"the filters took {self._filtered} groups since the last step (in all: {reasons}), mean "
                f"reward {fmean(self._judged):.3g}: the task is too hard, too easy or solved for this policy. Change "
                "the data, raise `group_size`, loosen `filters`, or raise `max_filtered`"
            )

    async def _sample(self, prompt: Prompt) -> list[Completion]:
        """The completions of a group; none when its engine was lost too often. Leaves it `sampling` then."""
        c = self.config
        seed = sample_seed(c.seed, prompt.ordinal) if c.rollout.seeded else None
        for again in range(c.rollout.retries, -1, -1):
            self.admission.move(prompt.ordinal, "sampling")
            try:
                completions = reject_aborted(await self.rollouts.sample(prompt.token_ids, c.group_size, seed=seed))
            except EngineLost:
                if again:
                    self.admission.move(prompt.ordinal, "admitted")
                continue
            self.admission.move(prompt.ordinal, "scoring")
            return completions
        return []

    def _forget(self, ordinal: int) -> None:
        del self._since[ordinal], self._tasks[ordinal]
        if not self._since:
            self._busy += now() - self._busy_since

    async def _step(self, step: int) -> bool:
        """One step; False when the run was told to stop before it could begin."""
        c = self.config
        began, busy = time.perf_counter(), self._sampling_seconds()
        ordinals = await self._next_groups(step)
        if ordinals is None:
            return False
        waited = time.perf_counter() - began
        queues = {
            f"queue/{state}": float(self.admission.ledger.count(state)) for state in ("sampling", "scoring", "ready")
        }
        queues["queue/oldest_s"] = now() - min(self._since.values()) if self._since else 0.0
        trajectories = [t for ordinal in ordinals for t in self._ready.pop(ordinal)]
        metrics = batch_metrics(trajectories, self.admission.version, c.group_size) | queues
        if c.filters and self._judged:
            metrics["filter/taken_frac"] = self._filtered / len(self._judged)
            metrics["filter/reward_mean"] = fmean(self._judged)
        self._judged, self._filtered, self._nonfinite = [], 0, 0

        learning = time.perf_counter()
        metrics |= await self.learner.step(collate(trajectories))
        learned = time.perf_counter() - learning
        metrics |= trainer_speed(metrics, learned)
        sync = await self.learner.publish(self.admission.version + 1)
        async with self._changed:
            for late in self.admission.publish():
                if late in self._tasks:
                    self._tasks[late].cancel()
                    self._forget(late)
                self._ready.pop(late, None)
            self._changed.notify_all()

        tokens = sum(sum(t.mask) for t in trajectories)
        self.trained_tokens += tokens
        seconds = time.perf_counter() - began
        sampling = self._sampling_seconds() - busy
        ledger = self.admission.ledger
        metrics |= {f"ledger/{state}": float(n) for state, n in ledger.summary().items()}
        too_old = ledger.count("filtered(too_old)")
        metrics |= {
            "weight_sync/seconds": sync.seconds,
            "weight_sync/pause_seconds": sync.pause_seconds,
            "weight_sync/bytes": float(sync.bytes),
            "weight_sync/version": float(self.admission.version),
            "weight_sync/verified": float(sync.verified),
            "weight_sync/failed": float(sync.failed),
            "timing_s/wait_for_samples": waited,
            "timing_s/learn": learned,
            "timing_s/step": seconds,
            "staleness/dropped_frac": too_old / (too_old + ledger.count("trained")),
            "perf/tokens_per_s": tokens / seconds,
            "perf/rollout_tokens_per_s": tokens / sampling if sampling else math.nan,
            "perf/trainer_idle_frac": waited / seconds,
            "perf/rollout_idle_frac": max(0.0, 1.0 - sampling / seconds),
        }
        self.on_samples(step, trajectories)
        if step == c.steps or (c.eval_every and step % c.eval_every == 0):
            metrics |= await self._evaluated()
        self.tracker.log(step, metrics)
        return True

    async def _evaluated(self) -> dict[str, float]:
        """Nothing, and owed from now on, when the run is told to stop meanwhile."""
        evaluating = asyncio.ensure_future(self.evaluate())
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({evaluating, stopping}, return_when=asyncio.FIRST_COMPLETED)
            self._owes_evaluation = not evaluating.done()
            return evaluating.result() if evaluating.done() else {}
        finally:
            evaluating.cancel()
            stopping.cancel()

    def _sampling_seconds(self) -> float:
        """Seconds so far in which the engines had work."""
        return self._busy + (now() - self._busy_since if self._since else 0.0)

    async def _next_groups(self, step: int) -> list[int] | None:
        """Ordinals of the oldest finished groups of one step, or None when the run is told to stop; StallError when
        they do not come in time."""
        deadline = self.config.deadlines.sample_s
        try:
            async with asyncio.timeout(deadline), self._changed:
                await self._changed.wait_for(lambda: self._stop.is_set() or self.admission.step())
                if self._stop.is_set():
                    return None
                ordinals = self.admission.step()
                assert ordinals is not None
                self.admission.train(ordinals)
                return ordinals
        except TimeoutError:
            oldest = min(self._since.items(), key=lambda kv: kv[1], default=None)
            age = f"; the oldest, prompt {oldest[0]}, since {now() - oldest[1]:.0f} s" if oldest else ""
            raise StallError(
                f"step {step} waited {deadline:g} s for the engines: {len(self._ready)} of "
                f"{self.config.prompts_per_step} groups are ready, {len(self._since)} are being sampled or judged"
                f"{age}. Look at the engines' log, or raise `deadlines.sample_s`"
            ) from None


def reject_aborted(completions: list[Completion]) -> list[Completion]:
    """The completions. Raises EngineLost where one was aborted: half a reply is no sample."""
    if any(completion.finish_reason == "abort" for completion in completions):
        raise EngineLost("vLLM aborted a request")
    return completions


def now() -> float:
    """Seconds on the clock of the running event loop."""
    return asyncio.get_running_loop().time()


def first_error(group: BaseExceptionGroup) -> BaseException:
    """The first single error inside nested groups: what the user has to read."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
