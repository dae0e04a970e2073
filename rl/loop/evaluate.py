"""How good is the policy now? Samples on held-out sets, with standard errors."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rl.config import Config
from rl.data import Eval
from rl.environments.types import EnvError
from rl.errors import first_error
from rl.judges.hearing import JudgeError
from rl.loop.estimates import NO_MEANS, Means, Problems, estimates, names, of_problem, weighted
from rl.loop.players import MAX_SCORING, Episodes, judged, reject_aborted
from rl.loop.stream import sample_seed
from rl.protocols import EngineLost, Rollouts
from rl.rewards.score import Asked, Reward, RewardError, reply_to, score_all, score_in_time
from rl.typed import show
from rl.types import Completion, Prompt, Reply

EVALUATION = 7919
"""Added to the run's seed, so that an evaluation does not sample what training samples."""
AGAIN = 2 * EVALUATION
"""Added for a second evaluation, whose samples are independent of those of the first."""
Rewards = list[float | None]
"""Of the samples of one problem; None where the reward does not apply."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A held-out set, with the run's settings where it has none of its own."""

    prompts: list[Prompt]
    samples: int
    temperature: float | None
    """None: that of training."""
    every: int
    """Steps between evaluations; 0: only before the first step and after the last."""
    reward: Reward | None = None
    player: Episodes | None = None
    """Plays episodes, and no reward is used."""
    answer: Callable[[Reply], Any] | None = None

    @property
    def figures(self) -> list[str]:
        """What is measured on it."""
        return names(self.samples, majority=self.answer is not None)

    def due(self, step: int, steps: int) -> bool:
        """Whether it is evaluated after a step of so many."""
        return step in (0, steps) or (self.every > 0 and step % self.every == 0)


def held_out(config: Config, given: Eval, prompts: list[Prompt], player: Episodes | None = None) -> HeldOut:
    """A set as it is evaluated. `player` plays the episodes of its environment, or of the run's."""
    own = given.reward is not None
    return HeldOut(
        prompts=prompts,
        samples=config.eval_samples if given.samples is None else given.samples,
        temperature=config.eval_temperature if given.temperature is None else given.temperature,
        every=config.eval_every if given.every is None else given.every,
        reward=given.reward or config.eval_reward or config.reward,
        player=None if own else player,
        answer=given.answer,
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured."""

    metrics: dict[str, float]
    """`eval/<set>/<figure>`, and `<figure>_se`, the standard error over problems: NaN for a single problem. Means of
    several sets are `eval/<mean>/mean`."""
    problems: dict[str, Problems]
    """The figures of each problem by set, for comparisons; none of problems that failed."""


async def evaluate(
    config: Config,
    rollouts: Rollouts,
    decode: Callable[..., str],
    sets: Mapping[str, HeldOut],
    means: Means = NO_MEANS,
    *,
    seeds: int = EVALUATION,
    done: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Sample and score every set, one after the other. Seeds do not change between calls with the same `seeds`. `done`
    is called after each problem.

    A problem whose environment or judge fails is left out and counted in failed_frac; above `config.max_failed` of them
    the set has no score, and EnvError is raised when none is left.
    """
    metrics: dict[str, float] = {}
    measured: dict[str, Problems] = {}
    scoring = asyncio.Semaphore(MAX_SCORING)
    for name, each in sets.items():
        found = await _Sampling(config, rollouts, decode, each, scoring, config.seed + seeds, done).all()
        tried = {p.ordinal: t for p, t in zip(each.prompts, found, strict=True) if not isinstance(t, EnvError)}
        if failures := [t for t in found if isinstance(t, EnvError)]:
            metrics[f"eval/{name}/failed_frac"] = len(failures) / len(found)
            if not tried:
                raise EnvError(f"every problem of the set {name!r} failed. The first: {failures[0]}") from failures[0]
            if len(failures) > config.max_failed * len(found):
                continue  # the others may be the easy ones
        measured[name], missing = by_problem(tried, each.samples)
        if missing:
            metrics[f"eval/{name}/not_applicable_frac"] = missing
        metrics |= {f"eval/{name}/{figure}": value for figure, value in estimates(measured[name].values()).items()}
    return Evaluation(metrics=metrics | weighted(metrics, means), problems=measured)


def by_problem(tried: Mapping[int, tuple[Rewards, Sequence[Any] | None]], n: int) -> tuple[Problems, float]:
    """The figures of each problem from the rewards and answers of its n samples, and the share of the samples to which
    the reward does not apply: they are left out."""
    found: dict[int, dict[str, float]] = {}
    missing = total = 0
    for ordinal, (rewards, answers) in tried.items():
        applied = [r for r in rewards if r is not None]
        missing, total = missing + len(rewards) - len(applied), total + len(rewards)
        if applied:
            found[ordinal] = of_problem(applied, answers, n)
    return found, missing / total if total else 0.0


def answers_of(answer: Callable[[Reply], Any], replies: list[Reply]) -> list[Any]:
    """What replies vote for. Raises RewardError for answers that cannot be counted."""
    try:
        found = [answer(reply) for reply in replies]
        hash(tuple(found))
    except Exception as error:  # the user's function may raise anything
        raised = f"{type(error).__name__}: {error}"
        raise RewardError(f"{show(answer)} must return a text, a number or None as answer ({raised})") from error
    return found


@dataclass(frozen=True)
class _Sampling:
    """The evaluation of one set."""

    config: Config
    rollouts: Rollouts
    decode: Callable[..., str]
    set: HeldOut
    scoring: asyncio.Semaphore
    seed: int
    done: Callable[[], None]

    async def all(self) -> list[tuple[Rewards, Sequence[Any] | None] | EnvError]:
        r = self.config.rollout
        # More requests would only wait in the engines' queues.
        sampling = asyncio.Semaphore(max(1, r.engines * r.max_num_seqs // self.set.samples))
        try:
            async with asyncio.TaskGroup() as tasks:
                asked = [tasks.create_task(self.problem(prompt, sampling)) for prompt in self.set.prompts]
                for task in asked:
                    task.add_done_callback(lambda _: self.done())
        except BaseExceptionGroup as group:
            first = first_error(group)
            raise first from first.__cause__
        return [task.result() for task in asked]

    async def problem(
        self, prompt: Prompt, sampling: asyncio.Semaphore
    ) -> tuple[Rewards, Sequence[Any] | None] | EnvError:
        c, each = self.config, self.set
        if each.player is not None:
            async with sampling:
                return await self.episodes(each.player, prompt)
        assert each.reward is not None, "a set has a reward or a player"
        async with sampling:
            completions = await self.sample(prompt, c.rollout.retries)
        replies = [reply_to(prompt, completion, self.decode) for completion in completions]

        async def scored(reward: Reward, asked: Asked) -> Any:
            async with self.scoring:
                call = partial(score_in_time, reward, asked, prompt.ordinal, c.deadlines.reward_s)
                return (await judged(call, c.rollout.retries))[0]

        try:
            rewards = [points for points, _ in await score_all(each.reward, replies, scored)]
        except JudgeError as error:
            return error
        return rewards, await asyncio.to_thread(answers_of, each.answer, replies) if each.answer else None

    async def episodes(self, player: Episodes, prompt: Prompt) -> tuple[Rewards, None] | EnvError:
        n = self.set.samples
        group = await player.play(prompt, n, seed=self.seed, temperature=self.set.temperature)
        if isinstance(group.error, EnvError):
            return group.error
        if group.error is not None:
            raise group.error
        rewards = {t.episode: t.reward for t in group.rows}
        return [rewards.get(member) for member in range(n)], None

    async def sample(self, prompt: Prompt, retries: int) -> list[Completion]:
        seed = sample_seed(self.seed, prompt.ordinal)
        try:
            n, temperature = self.set.samples, self.set.temperature
            return reject_aborted(await self.rollouts.sample(prompt.token_ids, n, seed=seed, temperature=temperature))
        except EngineLost:
            if not retries:
                raise
            return await self.sample(prompt, retries - 1)
