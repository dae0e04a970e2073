"""How does a prompt become a group that a step can train on? It is admitted, sampled, scored and filtered."""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

from rl.config import Config
from rl.environments.group import Group
from rl.environments.types import EnvError
from rl.filters import reason
from rl.judges.hearing import JudgeError
from rl.loop.admission import Admission
from rl.loop.in_flight import InFlight
from rl.loop.players import Player
from rl.protocols import StallError
from rl.typed import show
from rl.types import Prompt, Trajectory

Left = Callable[[int, str, list[int], list[Trajectory], str], None]
"""Hears of a group that is not trained on: its ordinal, its end, the prompt's tokens and its rows, as far as they are
known, and the error."""
RECENT = 50
"""Groups among which those are counted that failed because of their environment or their judge."""


@dataclass
class Tally:
    """What happened to the groups that were scored since the last step."""

    rewards: list[float] = field(default_factory=list[float])
    """Mean reward of each group with finite log-probabilities to which the reward applied, filtered or not."""
    groups: int = 0
    """Those groups, and those to which it did not apply."""
    filtered: int = 0
    """How many of them were left out."""
    nonfinite: int = 0
    """Groups with a log-probability that is NaN or infinite."""
    samples: int = 0
    not_applicable: int = 0
    """Samples to which the reward did not apply."""
    replayed: int = 0
    """Episodes that were played again because their environment or their engine failed."""

    def metrics(self, *, filters: bool) -> dict[str, float]:
        """With filters, or where groups were left out without them: their share, and the mean reward before that. Where
        the reward did not apply to some samples: their share."""
        metrics: dict[str, float] = {}
        if self.groups and (filters or self.filtered):
            metrics["filter/taken_frac"] = self.filtered / self.groups
        if self.rewards and (filters or self.filtered):
            metrics["filter/reward_mean"] = fmean(self.rewards)
        if self.not_applicable:
            metrics["reward/not_applicable_frac"] = self.not_applicable / self.samples
        if self.replayed:
            metrics["episodes/replayed"] = float(self.replayed)
        return metrics


@dataclass(kw_only=True)
class Groups:
    """The groups of a run, from admission until a step takes them. `admission` decides; this class acts and waits."""

    config: Config
    player: Player
    prompts: Iterator[Prompt]
    set_aside: Callable[[list[Trajectory]], None]
    """Keeps a group with log-probabilities that are NaN or infinite, for inspection."""
    admission: Admission
    left: Left = lambda ordinal, end, prompt, rows, error: None
    ready: dict[int, list[Trajectory]] = field(init=False, default_factory=dict[int, list[Trajectory]])
    in_flight: InFlight = field(init=False, default_factory=InFlight)
    tally: Tally = field(init=False, default_factory=Tally)
    stopping: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _changed: asyncio.Condition = field(init=False, default_factory=asyncio.Condition)
    """Notified after every change of `admission` that may let somebody continue."""
    _settled: int = field(init=False, default=0)
    """Groups that were sampled and scored so far, whatever became of them."""
    _recent: deque[bool] = field(init=False, default_factory=lambda: deque[bool](maxlen=RECENT))
    """Whether each of the last groups failed because of its environment or its judge."""
    _first: tuple[Prompt, EnvError] | None = field(init=False, default=None)
    """The first of those failures."""

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
        group = await self.player.group(prompt, partial(self.admission.move, prompt.ordinal))
        async with self._changed:
            self.in_flight.end(prompt.ordinal)
            self.tally.replayed += group.replayed
            try:
                if group.failed:
                    self.admission.move(prompt.ordinal, f"failed({group.failed})")
                else:
                    self._settle(prompt.ordinal, group.rows, group.samples)
            finally:
                if prompt.ordinal not in self.ready:
                    end, error = self.admission.ledger.states[prompt.ordinal], str(group.error or "")
                    self.left(prompt.ordinal, end, prompt.token_ids, group.rows, error)
            self._check_environment(prompt, group)
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
                self.left(late, "filtered(too_old)", [], self.ready.pop(late, []), "")
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

    def _settle(self, ordinal: int, group: list[Trajectory], samples: int) -> None:
        """Decide what becomes of a scored group, of which so many were sampled."""
        # A sum of finite float32 numbers is finite, and takes less than a test of each.
        if not all(math.isfinite(sum(t.logprobs)) for t in group):
            # Never replaced by a number that looks right: the group is set aside, counted, and another admitted.
            self.admission.move(ordinal, "filtered(nonfinite_logprobs)")
            self.set_aside(group)
            self.tally.nonfinite += 1
            self._check_finite()
            return
        tally, why = self.tally, self._why_not(group)
        self.admission.move(ordinal, f"filtered({why})" if why else "ready")
        tally.groups += 1
        tally.samples += samples
        # The rows of an episode have one reward.
        rewards = {t.episode: t.reward for t in group}
        tally.not_applicable += samples - len(rewards)
        if rewards:
            tally.rewards.append(fmean(rewards.values()))
        if why:
            tally.filtered += 1
            self._check_filters()
        else:
            self.ready[ordinal] = group

    def _why_not(self, group: list[Trajectory]) -> str | None:
        """Why a group must not be trained on; None if it may be."""
        if not group:
            return "not_applicable"
        return reason(self.config.filters, group) if any(t.trained for t in group) else "all_truncated"

    def _check_environment(self, prompt: Prompt, group: Group) -> None:
        """Raise EnvError, with the first failure as its cause, when too many groups failed because of it."""
        error = group.error if isinstance(group.error, EnvError) else None
        self._recent.append(error is not None)
        if error and self._first is None:
            self._first = prompt, error
        failed, most = sum(self._recent), self.config.max_failed * RECENT
        if self._first and failed > most:
            first, cause = self._first
            whose = "a judge" if isinstance(cause, JudgeError) else "the environment"
            raise EnvError(
                f"{failed} of the last {len(self._recent)} groups failed because of {whose} (max_failed="
                f"{self.config.max_failed:g} of {RECENT} groups). The first was prompt {first.ordinal} (task "
                f"{show(dict(first.task), 180)}): {cause}"
            ) from cause

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
            ledger, rewards = self.admission.ledger, self.tally.rewards
            reasons = {s: n for s, n in ledger.summary().items() if s.startswith("filtered") and n}
            mean = f"{fmean(rewards):.3g}" if rewards else "none, because the reward never applied"
            raise StallError(
                f"the filters took {self.tally.filtered} groups since the last step (in all: {reasons}), mean "
                f"reward {mean}: the task is too hard, too easy or solved for this policy. "
                "Change the data, raise `group_size`, loosen `filters`, or raise `max_filtered`"
            )
