"""How good is the policy now? Samples on held-out sets, with standard errors."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from rl.config import Config
from rl.environments.types import EnvError
from rl.filters import ROUNDING
from rl.loop.errors import first_error
from rl.loop.players import MAX_SCORING, Episodes
from rl.loop.stream import sample_seed
from rl.protocols import EngineLost, Rollouts
from rl.rewards.score import Asked, Reward, reply_to, score_all, score_in_time
from rl.types import Completion, Prompt

EVALUATION = 7919
"""Added to the run's seed, so that an evaluation does not sample what training samples."""


async def evaluate(
    config: Config,
    rollouts: Rollouts,
    decode: Callable[..., str],
    sets: Mapping[str, list[Prompt]],
    player: Episodes | None = None,
) -> dict[str, float]:
    """Metrics by set, with k = `config.eval_samples`: avg@k is the mean reward, pass@k the share of problems with at
    least one reward of 1, avg@k_se and pass@k_se their standard errors over problems (NaN for a single problem). Seeds
    do not change between calls. `player` plays episodes where the run has an environment. A
    problem whose environment fails is left out and counted in failed_frac; above `config.max_failed` of them the set
    has no score, and EnvError is raised when none is left."""
    k, reward = config.eval_samples, config.eval_reward or config.reward
    # More requests would only wait in the engines' queues.
    sampling = asyncio.Semaphore(max(1, config.rollout.engines * config.rollout.max_num_seqs // k))
    scoring = asyncio.Semaphore(MAX_SCORING)

    async def problem(prompt: Prompt) -> list[float | None] | EnvError:
        if player is not None:
            return await episodes(player, prompt)
        assert reward is not None, "a run has a reward or a player"
        seed = sample_seed(config.seed + EVALUATION, prompt.ordinal)
        async with sampling:
            completions = await with_retries(
                lambda: rollouts.sample(prompt.token_ids, k, seed=seed, temperature=config.eval_temperature),
                config.rollout.retries,
            )
        replies = [reply_to(prompt, completion, decode) for completion in completions]

        async def scored(reward: Reward, asked: Asked) -> Any:
            async with scoring:
                return await score_in_time(reward, asked, prompt.ordinal, config.deadlines.reward_s)

        return [points for points, _ in await score_all(reward, replies, scored)]

    async def episodes(player: Episodes, prompt: Prompt) -> list[float | None] | EnvError:
        async with sampling:
            group = await player.play(prompt, k, seed=config.seed + EVALUATION, temperature=config.eval_temperature)
        if isinstance(group.error, EnvError):
            return group.error
        if group.error is not None:
            raise group.error
        rewards = {t.episode: t.reward for t in group.rows}
        return [rewards.get(member) for member in range(k)]

    async def problems(prompts: list[Prompt]) -> list[list[float | None] | EnvError]:
        try:
            async with asyncio.TaskGroup() as tasks:
                asked = [tasks.create_task(problem(prompt)) for prompt in prompts]
        except BaseExceptionGroup as group:
            first = first_error(group)
            raise first from first.__cause__
        return [task.result() for task in asked]

    async def with_retries(sample: Callable[[], Awaitable[list[Completion]]], retries: int) -> list[Completion]:
        try:
            return await sample()
        except EngineLost:
            if not retries:
                raise
            return await with_retries(sample, retries - 1)

    metrics: dict[str, float] = {}
    for name, prompts in sets.items():
        found = await problems(prompts)
        scored = [each for each in found if not isinstance(each, EnvError)]
        if failures := [each for each in found if isinstance(each, EnvError)]:
            metrics[f"eval/{name}/failed_frac"] = len(failures) / len(found)
            if not scored:
                raise EnvError(f"every problem of the set {name!r} failed. The first: {failures[0]}") from failures[0]
            if len(failures) > config.max_failed * len(found):
                continue  # the others may be the easy ones
        metrics |= figures(name, k, scored)
    return metrics


def figures(name: str, k: int, found: Sequence[Sequence[float | None]]) -> dict[str, float]:
    """The metrics of one set from the rewards of each problem; None where the reward does not apply, which is counted
    and left out."""
    rewards = [applied for each in found if (applied := [r for r in each if r is not None])]
    left_out = sum(r is None for each in found for r in each)
    metrics = {f"eval/{name}/not_applicable_frac": left_out / sum(map(len, found))} if left_out else {}
    if not rewards:
        return metrics
    means, passed = [fmean(r) for r in rewards], [float(max(r) >= 1.0 - ROUNDING) for r in rewards]
    return metrics | {
        f"eval/{name}/avg@{k}": fmean(means),
        f"eval/{name}/avg@{k}_se": standard_error(means),
        f"eval/{name}/pass@{k}": fmean(passed),
        f"eval/{name}/pass@{k}_se": standard_error(passed),
    }


def standard_error(values: list[float]) -> float:
    """Standard error of the mean of a sample; NaN for a single value, which shows no spread."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
