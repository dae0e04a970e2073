"""How good is the policy now? Samples on held-out sets, with standard errors."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from statistics import fmean, stdev

from rl.config import Config
from rl.filters import ROUNDING
from rl.loop.errors import first_error
from rl.loop.groups import MAX_SCORING
from rl.loop.stream import sample_seed
from rl.protocols import EngineLost, Rollouts
from rl.rewards.score import reply_to, score_in_time
from rl.types import Completion, Prompt


async def evaluate(
    config: Config,
    rollouts: Rollouts,
    decode: Callable[..., str],
    sets: Mapping[str, list[Prompt]],
) -> dict[str, float]:
    """Metrics by set, with k = `config.eval_samples`: avg@k is the mean reward, pass@k the share of problems with at
    least one reward of 1, avg@k_se the standard error of the mean over problems (NaN for a single problem). Seeds do
    not change between calls."""
    k, reward = config.eval_samples, config.eval_reward or config.reward
    # More requests would only wait in the engines' queues.
    sampling = asyncio.Semaphore(max(1, config.rollout.engines * config.rollout.max_num_seqs // k))
    scoring = asyncio.Semaphore(MAX_SCORING)

    async def problem(prompt: Prompt) -> list[float]:
        seed = sample_seed(config.seed + 7919, prompt.ordinal)
        async with sampling:
            completions = await with_retries(
                lambda: rollouts.sample(prompt.token_ids, k, seed=seed, temperature=config.eval_temperature),
                config.rollout.retries,
            )
        rewards: list[float] = []
        for completion in completions:
            reply = reply_to(prompt, completion, decode)
            async with scoring:
                rewards.append((await score_in_time(reward, reply, prompt.ordinal, config.deadlines.reward_s))[0])
        return rewards

    async def problems(prompts: list[Prompt]) -> list[list[float]]:
        try:
            async with asyncio.TaskGroup() as tasks:
                asked = [tasks.create_task(problem(prompt)) for prompt in prompts]
        except BaseExceptionGroup as group:
            raise first_error(group) from None
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
        rewards = await problems(prompts)
        means = [fmean(r) for r in rewards]
        metrics[f"eval/{name}/avg@{k}"] = fmean(means)
        metrics[f"eval/{name}/avg@{k}_se"] = standard_error(means)
        metrics[f"eval/{name}/pass@{k}"] = fmean(max(r) >= 1.0 - ROUNDING for r in rewards)
    return metrics


def standard_error(values: list[float]) -> float:
    """Standard error of the mean of a sample; NaN for a single value, which shows no spread."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
