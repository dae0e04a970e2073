"""How good is the policy now? Samples on held-out sets, with standard errors."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from statistics import fmean, pstdev

from rl.config import Config
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
    least one reward of 1, avg@k_se the standard error of the mean over problems. Seeds do not change between calls."""
    k, reward = config.eval_samples, config.eval_reward or config.reward

    async def problem(name: str, prompt: Prompt) -> list[float]:
        seed = sample_seed(config.seed + 7919, prompt.ordinal)
        completions = await with_retries(
            lambda: rollouts.sample(prompt.token_ids, k, seed=seed, temperature=config.eval_temperature),
            config.rollout.retries,
        )
        rewards: list[float] = []
        for completion in completions:
            reply = reply_to(prompt, completion, decode)
            rewards.append((await score_in_time(reward, reply, prompt.ordinal, config.deadlines.reward_s))[0])
        return rewards

    async def with_retries(sample: Callable[[], Awaitable[list[Completion]]], retries: int) -> list[Completion]:
        try:
            return await sample()
        except EngineLost:
            if not retries:
                raise
            return await with_retries(sample, retries - 1)

    metrics: dict[str, float] = {}
    for name, prompts in sets.items():
        rewards = await asyncio.gather(*(problem(name, p) for p in prompts))
        means = [fmean(r) for r in rewards]
        metrics[f"eval/{name}/avg@{k}"] = fmean(means)
        metrics[f"eval/{name}/avg@{k}_se"] = pstdev(means) / math.sqrt(len(means))
        metrics[f"eval/{name}/pass@{k}"] = fmean(max(r) >= 1.0 for r in rewards)
    return metrics
