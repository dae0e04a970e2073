"""How does a prompt become a group that a step can train on? It is admitted, sampled, scored and filtered."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from statistics import fmean

from rl.batch import trajectory
from rl.config import Config
from rl.filters import reason
from rl.loop.admission import Admission
from rl.loop.in_flight import InFlight
from rl.loop.stream import sample_seed
from rl.protocols import EngineLost, Rollouts, StallError
from rl.rewards.score import Reward, reply_to
from rl.types import Completion, Prompt, Reply, Trajectory

Score = Callable[[Reward, Reply, int, float], Awaitable[tuple[float, dict[str, float]]]]
"""`rl.rewards.score.score_in_time`, or a replacement with the same arguments."""
MAX_SCORING = 64
"""Replies that are scored at the same time, each in a thread: many rewards wait for a sandbox or for a model."""


@dataclass
class Tally:
    """What happened to the groups that were scored since the last step."""

    rewards: list[float] = field(default_factory=list[float])
    """Mean reward of each group with finite log-probabilities, filtered or not."""
    filtered: int = 0
    """How many of them the filters took."""
    nonfinite: int = 0
    """Groups with a log-probability that is NaN or infinite."""

    def metrics(self) -> dict[str, float]:
        """The share of groups that the filters took, and the mean reward before filtering; empty without groups."""
        if not self.rewards:
            return {}
        return {"filter/taken_frac": self.filtered / len(self.rewards), "filter/reward_mean": fmean(self.rewards)}


@dataclass(kw_only=True)
class Groups:
    """The groups of a run, from admission until a step takes them. `admission` decides; this class acts and waits."""

    config: Config
    rollouts: Rollouts
    prompts: Iterator[Prompt]
    decode: Callable[..., str]
    score: Score
    set_aside: Callable[[list[Trajectory]], None]
    """Keeps a group with log-probabilities that are NaN or infinite, for inspection."""
    admission: Admission
    ready: dict[int, list[Trajectory]] = field(init=False, default_factory=dict[int, list[Trajectory]])
    in_flight: InFlight = field(init=False, default_factory=InFlight)
    tally: Tally = field(init=False, default_factory=Tally)
    stopping: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _changed: asyncio.Condition = field(init=False, default_factory=asyncio.Condition)
    """Notified after every change of `admission` that may let somebody continue."""
    _settled: int = field(init=False, default=0)
    """Groups that were sampled and scored so far, whatever became of them."""
    _scoring: asyncio.Semaphore = field(init=False, default_factory=lambda: asyncio.Semaphore(MAX_SCORING))

    async def admit(self, tasks: asyncio.TaskGroup) -> None:
        """Start a task for the next prompt whenever the staleness bound allows it. Runs until it is cancelled."""
        while True:
            async with self._changed:
                await self._changed.wait_for(self.admission.room)
            prompt = next(self.prompts)
            self.admission.admit(prompt.ordinal)
            task = tasks.create_task(self.process(prompt), name=f"sample prompt {prompt.ordinal}")
            self.in_flight.start(prompt.ordinal, task)

    async def process(self, prompt: Prompt) -> None:
        """Sample and score one group, and decide whether it is ready, filtered or failed."""
        completions = await self._sample(prompt)
        group = list(await asyncio.gather(*(self._scored(prompt, completion) for completion in completions)))
        async with self._changed:
            self.in_flight.end(prompt.ordinal)
            self._settle(prompt.ordinal, group)
            self._settled += 1
            self._changed.notify_all()

    async def take(self, step: int) -> list[Trajectory] | None:
        """The oldest ready groups of one step, or None when the run is being stopped.

        Raises StallError when no group is sampled and scored within `deadlines.sample_s` seconds.
        """
        async with self._changed:
            while not self.stopping.is_set():
                ordinals = self.admission.step()
                if ordinals is not None:
                    self.admission.train(ordinals)
                    return [t for ordinal in ordinals for t in self.ready.pop(ordinal)]
                await self._one_more(step)
        return None

    async def _one_more(self, step: int) -> None:
        """Wait until one more group is settled, or the run is being stopped. `_changed` is held."""
        deadline, settled = self.config.deadlines.sample_s, self._settled
        try:
            async with asyncio.timeout(deadline):
                await self._changed.wait_for(lambda: self.stopping.is_set() or self._settled != settled)
        except TimeoutError:
            oldest = self.in_flight.oldest()
            age = f"; the oldest, prompt {oldest[0]}, since {oldest[1]:.0f} s" if oldest else ""
            raise StallError(
                f"step {step} waited {deadline:g} s for one more group: {len(self.ready)} of "
                f"{self.config.prompts_per_step} groups are ready, {len(self.in_flight.tasks)} are being sampled or "
                f"scored{age}. Look at the engines' log, or raise `deadlines.sample_s`"
            ) from None

    async def publish(self) -> None:
        """The engines now serve the next version: groups that it makes too old are given up."""
        async with self._changed:
            for late in self.admission.publish():
                self.in_flight.cancel(late)
                self.ready.pop(late, None)
            self._changed.notify_all()

    async def stop(self) -> None:
        """Let `take` return None from now on."""
        async with self._changed:
            self.stopping.set()
            self._changed.notify_all()

    def cancel(self) -> None:
        """Give up all groups that are in flight."""
        for task in self.in_flight.tasks.values():
            task.cancel()

    async def _sample(self, prompt: Prompt) -> list[Completion]:
        """The completions of a group. Empty, with the group still `sampling`, when its engine was lost too often."""
        c = self.config
        seed = sample_seed(c.seed, prompt.ordinal) if c.rollout.seeded else None
        for retries_left in range(c.rollout.retries, -1, -1):
            self.admission.move(prompt.ordinal, "sampling")
            try:
                completions = reject_aborted(await self.rollouts.sample(prompt.token_ids, c.group_size, seed=seed))
            except EngineLost:
                if retries_left:
                    self.admission.move(prompt.ordinal, "admitted")
                continue
            self.admission.move(prompt.ordinal, "scoring")
            return completions
        return []

    async def _scored(self, prompt: Prompt, completion: Completion) -> Trajectory:
        c, reply = self.config, reply_to(prompt, completion, self.decode)
        async with self._scoring:
            reward, parts = await self.score(c.reward, reply, prompt.ordinal, c.deadlines.reward_s)
        return trajectory(prompt, completion, reward, parts)

    def _settle(self, ordinal: int, group: list[Trajectory]) -> None:
        if not group:
            self.admission.move(ordinal, "failed(engine_lost)")
        elif not all(math.isfinite(x) for t in group for x in t.logprobs):
            # Never replaced by a number that looks right: the group is set aside, counted, and another admitted.
            self.admission.move(ordinal, "filtered(nonfinite_logprobs)")
            self.set_aside(group)
            self.tally.nonfinite += 1
            self._check_finite()
        else:
            why = reason(self.config.filters, group)
            self.admission.move(ordinal, f"filtered({why})" if why else "ready")
            self.tally.rewards.append(fmean(t.reward for t in group))
            if why:
                self.tally.filtered += 1
                self._check_filters()
            else:
                self.ready[ordinal] = group

    def _check_finite(self) -> None:
        if self.tally.nonfinite > self.config.max_filtered * self.config.prompts_per_step:
            raise StallError(
                f"{self.tally.nonfinite} groups since the last step have log-probabilities that are NaN or infinite "
                f"(step -1 in samples.jsonl): do not trust the weights of version {self.admission.version}. Look at "
                "rollout_corr/* and actor/* of the last steps; lower trainer.lr"
            )

    def _check_filters(self) -> None:
        """Raise StallError when the filters leave too little: sampling costs time, and no step could ever begin."""
        if self.tally.filtered > self.config.max_filtered * self.config.prompts_per_step:
            ledger = self.admission.ledger
            reasons = {s: n for s, n in ledger.summary().items() if s.startswith("filtered") and n}
            raise StallError(
                f"the filters took {self.tally.filtered} groups since the last step (in all: {reasons}), mean "
                f"reward {fmean(self.tally.rewards):.3g}: the task is too hard, too easy or solved for this policy. "
                "Change the data, raise `group_size`, loosen `filters`, or raise `max_filtered`"
            )


def reject_aborted(completions: list[Completion]) -> list[Completion]:
    """The completions. Raises EngineLost where one was aborted: half a reply is no sample."""
    if any(completion.finish_reason == "abort" for completion in completions):
        raise EngineLost("vLLM aborted a request")
    return completions
