"""The loop: sample -> score -> batch -> learn -> publish, with bounded staleness and no silent wait."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from rl.batch import collate, trajectory
from rl.config import Config
from rl.data import sample_seed
from rl.ledger import Ledger
from rl.protocols import Learner, Rollouts, Tracker
from rl.rewards import judge_in_time
from rl.step_metrics import batch_metrics
from rl.types import Prompt, Reply, Trajectory

Evaluate = Callable[[], Awaitable[dict[str, float]]]


class StallError(RuntimeError):
    """A wait passed its deadline; the message says who waited for whom."""


@dataclass(kw_only=True)
class Loop:
    """One run. `version` counts published updates, so that step k samples under version k at `max_staleness` 0."""

    config: Config
    rollouts: Rollouts
    learner: Learner
    prompts: Iterator[Prompt]
    decode: Callable[[list[int]], str]
    tracker: Tracker
    evaluate: Evaluate
    on_samples: Callable[[int, list[Trajectory]], None] = lambda step, trajectories: None
    version: int = 0
    trained_tokens: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    _born: dict[int, int] = field(default_factory=dict)
    """Version at which each pending group was admitted: none of its tokens is older."""
    _sampling: dict[int, float] = field(default_factory=dict)
    """When each group began that is being sampled or judged."""
    _ready: list[list[Trajectory]] = field(default_factory=list)
    _busy: float = 0.0
    """Seconds in which some group was being sampled or judged, and when that last began."""
    _busy_since: float = 0.0
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def run(self) -> None:
        """Train for `config.steps` steps. Any task's failure ends the run with that task's own error."""
        try:
            async with asyncio.TaskGroup() as tasks:
                sampler = tasks.create_task(self._admit(tasks), name="admit prompts")
                for step in range(1, self.config.steps + 1):
                    await self._step(step)
                sampler.cancel()
        except BaseExceptionGroup as group:
            raise first_error(group) from None

    async def _admit(self, tasks: asyncio.TaskGroup) -> None:
        """Start a group whenever the staleness bound has room for it."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._admitted() < self._allowed())
            prompt = next(self.prompts)
            self.ledger.admit(prompt.ordinal)
            if not self._sampling:
                self._busy_since = time.monotonic()
            self._born[prompt.ordinal] = self.version
            self._sampling[prompt.ordinal] = time.monotonic()
            tasks.create_task(self._group(prompt), name=f"sample prompt {prompt.ordinal}")

    def _admitted(self) -> int:
        """Groups that were, are or will be trained on: all but the filtered ones."""
        return self.ledger.counts["pending"] + self.ledger.counts["trained"]

    def _allowed(self) -> int:
        """Groups that may have been admitted by now, so that those at the staleness bound always fit one step."""
        steps = min(self.version + self.config.max_staleness + 1, self.config.steps)
        return steps * self.config.prompts_per_step

    async def _group(self, prompt: Prompt) -> None:
        c = self.config
        seed = sample_seed(c.seed, prompt.ordinal) if c.rollout.seeded else None
        completions = await self.rollouts.sample(prompt.token_ids, c.group_size, seed=seed)
        group = []
        for completion in completions:
            reply = Reply(
                text=self.decode(completion.token_ids),
                finished=completion.finish_reason == "stop",
                task=prompt.task,
                token_ids=completion.token_ids,
            )
            reward, parts = await judge_in_time(c.reward, reply, prompt.ordinal, c.deadlines.reward_s)
            group.append(trajectory(prompt, completion, reward, parts))
        async with self._changed:
            del self._sampling[prompt.ordinal]
            if not self._sampling:
                self._busy += time.monotonic() - self._busy_since
            if all(math.isfinite(x) for t in group for x in t.logprobs):
                self._ready.append(group)
            else:
                # Never replaced by a number that looks right: the group is set aside, counted, and another admitted.
                self.ledger.settle(prompt.ordinal, "filtered(nonfinite_logprobs)")
                del self._born[prompt.ordinal]
                self.on_samples(-1, group)
            self._changed.notify_all()

    async def _step(self, step: int) -> None:
        c = self.config
        began, busy = time.perf_counter(), self._sampling_seconds()
        groups = await self._next_groups(step)
        waited = time.perf_counter() - began
        trajectories = [t for group in groups for t in group]
        metrics = batch_metrics(trajectories, self.version, c.group_size)

        learning = time.perf_counter()
        metrics |= await self.learner.step(collate(trajectories))
        learned = time.perf_counter() - learning
        sync = await self.learner.publish(self.version + 1)
        async with self._changed:
            self.version += 1
            for group in groups:
                self.ledger.settle(group[0].group, "trained")
                del self._born[group[0].group]
            self._changed.notify_all()

        tokens = sum(sum(t.mask) for t in trajectories)
        self.trained_tokens += tokens
        seconds = time.perf_counter() - began
        sampling = self._sampling_seconds() - busy
        metrics |= {f"ledger/{state}": float(n) for state, n in self.ledger.counts.items()}
        metrics |= {
            "weight_sync/seconds": sync.seconds,
            "weight_sync/pause_seconds": sync.pause_seconds,
            "weight_sync/bytes": float(sync.bytes),
            "weight_sync/version": float(self.version),
            "weight_sync/verified": float(sync.verified),
            "timing_s/wait_for_samples": waited,
            "timing_s/learn": learned,
            "timing_s/step": seconds,
            "perf/tokens_per_s": tokens / seconds,
            "perf/rollout_tokens_per_s": tokens / sampling if sampling else math.nan,
            "perf/trainer_idle_frac": waited / seconds,
            "perf/rollout_idle_frac": max(0.0, 1.0 - sampling / seconds),
        }
        self.on_samples(step, trajectories)
        if step == c.steps or (c.eval_every and step % c.eval_every == 0):
            metrics |= await self.evaluate()
        self.tracker.log(step, metrics)

    def _sampling_seconds(self) -> float:
        """Seconds so far in which the engines had work."""
        return self._busy + (time.monotonic() - self._busy_since if self._sampling else 0.0)

    def _enough(self) -> bool:
        """Whether a step can begin: it has its groups, and none that would be too old for the next is missing.

        A straggler does not hold up a step until its oldest token is `max_staleness` versions old.
        """
        due = self.version - self.config.max_staleness
        late = any(self._born[ordinal] <= due for ordinal in self._sampling)
        return len(self._ready) >= self.config.prompts_per_step and not late

    async def _next_groups(self, step: int) -> list[list[Trajectory]]:
        """The oldest finished groups of one step; StallError when they do not come in time."""
        need, deadline = self.config.prompts_per_step, self.config.deadlines.sample_s
        try:
            async with asyncio.timeout(deadline), self._changed:
                await self._changed.wait_for(self._enough)
                self._ready.sort(key=lambda group: self._born[group[0].group])
                groups, self._ready = self._ready[:need], self._ready[need:]
                return groups
        except TimeoutError:
            now = time.monotonic()
            oldest = min(self._sampling.items(), key=lambda kv: kv[1], default=None)
            age = f"; the oldest, prompt {oldest[0]}, since {now - oldest[1]:.0f} s" if oldest else ""
            raise StallError(
                f"step {step} waited {deadline:g} s for the engines: {len(self._ready)} of {need} groups are ready, "
                f"{len(self._sampling)} are being sampled or judged{age}. Look at the engines' log, or raise "
                "`deadlines.sample_s`"
            ) from None


def first_error(group: BaseExceptionGroup) -> BaseException:
    """The first single error inside nested groups: what the user has to read."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
