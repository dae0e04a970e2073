"""How a reply is judged: the user's reward function, its deadline, and errors that name the prompt."""

import asyncio
import math
from collections.abc import Callable, Mapping

from rl.types import Reply

Reward = Callable[[Reply], float | Mapping[str, float]]
"""Takes one reply, returns its reward, or named parts that are added up. Runs in a thread of the driver."""


class RewardError(RuntimeError):
    """The reward function failed. It never turns into a reward of 0: that would teach the policy the bug."""


def judge(reward: Reward, reply: Reply, ordinal: int) -> tuple[float, dict[str, float]]:
    """Reward and its parts. Raises RewardError, naming the prompt, when the function raises or returns no number."""
    where = f"the reward of prompt {ordinal} (task {dict(reply.task)}, reply {reply.text[:80]!r})"
    try:
        result = reward(reply)
    except Exception as error:
        raise RewardError(f"{where} raised {type(error).__name__}: {error}") from error
    parts = {k: float(v) for k, v in result.items()} if isinstance(result, Mapping) else {}
    total = sum(parts.values()) if isinstance(result, Mapping) else result
    if not isinstance(total, int | float) or not math.isfinite(total):
        raise RewardError(f"{where} is {result!r}; return a finite float, or a dict of finite floats")
    return float(total), parts


async def judge_in_time(
    reward: Reward, reply: Reply, ordinal: int, deadline_s: float
) -> tuple[float, dict[str, float]]:
    """`judge` in a thread. Raises RewardError after `deadline_s` seconds."""
    try:
        return await asyncio.wait_for(asyncio.to_thread(judge, reward, reply, ordinal), deadline_s)
    except TimeoutError:
        raise RewardError(
            f"the reward of prompt {ordinal} took longer than {deadline_s:g} s (task {dict(reply.task)}, reply "
            f"{reply.text[:80]!r}); bound its work, or raise `deadlines.reward_s`"
        ) from None
