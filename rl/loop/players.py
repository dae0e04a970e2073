"""How are the samples of a prompt made and scored? One reply and its reward, or an episode with an environment."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

from rl.batch import trajectory
from rl.config import Config
from rl.environments.group import Group, play_group, reason
from rl.environments.host import Host
from rl.environments.play import Chat, Stage, play
from rl.judges.hearing import JudgeError, about, hear
from rl.loop.stream import sample_seed, turn_seed
from rl.protocols import EngineLost, Rollouts
from rl.rewards.score import Asked, Reward, reply_to, score_all
from rl.types import Completion, Prompt, Trajectory, Verdict

Score = Callable[[Reward, Asked, int, float], Awaitable[Any]]
"""`rl.rewards.score.score_in_time`, or a replacement with the same arguments."""
Move = Callable[[str], None]
"""Moves a group to its next state in the ledger."""
MAX_SCORING = 64
"""Replies that are scored at the same time, each in a thread: many rewards wait for a sandbox or for a model."""


@runtime_checkable
class Player(Protocol):
    """Makes the groups of a run."""

    async def group(self, prompt: Prompt, move: Move) -> Group:
        """The scored group of an admitted prompt, which is moved to `scoring`; a failed one stays at `sampling`."""
        ...


@dataclass(kw_only=True)
class Replies:
    """One reply for each sample: a single call of the engine for the group, then the reward."""

    config: Config
    rollouts: Rollouts
    decode: Callable[..., str]
    score: Score
    _scoring: asyncio.Semaphore = field(init=False, default_factory=lambda: asyncio.Semaphore(MAX_SCORING))

    async def group(self, prompt: Prompt, move: Move) -> Group:
        """Sample and score one group; it fails when too many engines were lost, or a judge failed too often."""
        completions = await self._sample(prompt, move)
        n = self.config.group_size
        if not completions:
            return Group(rows=[], samples=n, failed="engine_lost")
        c, reward = self.config, self.config.reward
        assert reward is not None, "a run with an environment has another player"

        replies = [reply_to(prompt, completion, self.decode) for completion in completions]
        said: dict[int, list[Verdict]] = {}

        async def scored(reward: Reward, asked: Asked) -> Any:
            async with self._scoring:
                call = partial(self.score, reward, asked, prompt.ordinal, c.deadlines.reward_s)
                points, verdicts = await judged(call, c.rollout.retries)
            if isinstance(asked, list):
                said.update({id(reply): about(reply, asked, verdicts) for reply in asked})
            else:
                said[id(asked)] = verdicts
            return points

        try:
            scores = await score_all(reward, replies, scored)
        except JudgeError as error:
            return Group(rows=[], samples=n, failed=reason(error), error=error)
        rows = [
            replace(
                trajectory(prompt, completion, points, parts, mask_truncated=c.mask_truncated),
                episode=member,
                verdicts=tuple(said[id(replies[member])]),
            )
            for member, (completion, (points, parts)) in enumerate(zip(completions, scores, strict=True))
            if points is not None
        ]
        return Group(rows=rows, samples=n)

    async def _sample(self, prompt: Prompt, move: Move) -> list[Completion]:
        """The completions of one prompt, or [] when its engines were lost too often."""
        c = self.config
        seed = sample_seed(c.seed, prompt.ordinal) if c.rollout.seeded else None
        for retries_left in range(c.rollout.retries, -1, -1):
            move("sampling")
            try:
                completions = reject_aborted(await self.rollouts.sample(prompt.token_ids, c.group_size, seed=seed))
            except EngineLost:
                if retries_left:
                    move("admitted")
                continue
            move("scoring")
            return completions
        return []


PlayOne = Callable[[Prompt, int, int, float | None], Awaitable[list[Trajectory]]]
"""One episode of a prompt, given which of its group's it is, the run's seed, and a temperature (None: the run's)."""


async def judged(score: Callable[[], Awaitable[Any]], retries: int) -> tuple[Any, list[Verdict]]:
    """The result of a reward, and what judges said for it. Where a judge failed it is asked again, `retries` times at
    most. Raises the JudgeError of the last time."""
    while True:
        try:
            with hear() as heard:
                return await score(), heard.verdicts
        except JudgeError:
            if not retries:
                raise
            retries -= 1


@dataclass(kw_only=True)
class Episodes:
    """An episode for each sample."""

    config: Config
    stage: Any
    """What its episodes share: `rl.environments.play.Stage`, or `rl.agents.play.Stage`."""
    play_one: PlayOne
    counts: dict[str, float] = field(default_factory=dict[str, float])
    """What its episodes counted since `metrics`."""

    async def group(self, prompt: Prompt, move: Move) -> Group:
        """Play one group. It stays at `sampling` until all of its episodes are scored."""
        move("sampling")
        group = await self.play(prompt, self.config.group_size, seed=self.config.seed)
        if not group.failed:
            move("scoring")
        return group

    async def play(self, prompt: Prompt, n: int, *, seed: int, temperature: float | None = None) -> Group:
        """n episodes of one prompt, with the seeds of a run's seed; `temperature` defaults to the run's."""

        async def member(index: int) -> list[Trajectory]:
            return await self.play_one(prompt, index, seed, temperature)

        return await play_group(n, member, self.config.rollout.retries)

    def metrics(self) -> dict[str, float]:
        """What was counted since the last call."""
        found = dict(self.counts)
        self.counts.clear()
        return found


def in_environment(config: Config, stage: Stage) -> Episodes:
    """Episodes with an environment of their own."""

    async def one(prompt: Prompt, member: int, seed: int, temperature: float | None) -> list[Trajectory]:
        seeds = partial(turn_seed, seed, prompt.ordinal, member)
        at = replace(stage, temperature=temperature)
        return await play(at, prompt, member, seeds if config.rollout.seeded else lambda turn: None)

    return Episodes(config=config, stage=stage, play_one=one)


def stage_of(config: Config, rollouts: Rollouts, decode: Callable[..., str], chat: Chat, host: Host) -> Stage:
    """What the episodes of a run share."""
    return Stage(
        host=host,
        rollouts=rollouts,
        chat=chat,
        decode=decode,
        limits=config.limits,
        max_tokens=config.rollout.max_tokens,
        max_model_len=config.rollout.max_model_len,
        reward_s=config.deadlines.reward_s,
        mask_truncated=config.mask_truncated,
        tools=config.tools,
    )


def reject_aborted(completions: list[Completion]) -> list[Completion]:
    """The completions. Raises EngineLost where one was aborted: half a reply is no sample."""
    if any(completion.finish_reason == "abort" for completion in completions):
        raise EngineLost("vLLM aborted a request")
    return completions
