"""How a reply is judged: the user's reward function, its deadline, and errors that name the prompt."""

import asyncio
import math
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

from rl.types import Reply

Reward = Callable[[Reply], float | Mapping[str, float]]
"""Takes one reply, returns its reward, or named parts that are added up. Runs in a thread of the driver."""


class RewardError(RuntimeError):
    """The reward function failed. It never turns into a reward of 0: that would teach the policy the bug."""


def score(reward: Reward, reply: Reply, ordinal: int) -> tuple[float, dict[str, float]]:
    """Reward and its parts. Raises RewardError, naming the prompt, when the function raises or returns no number."""
    where = f"the reward of prompt {ordinal} (task {dict(reply.task)}, reply {reply.text[:80]!r})"
    try:
        result = reward(reply)
    except Exception as error:
        raise RewardError(f"{where} raised {type(error).__name__}: {error}") from error
    parts = dict(result) if isinstance(result, Mapping) else {}
    if result == {} or not all(isinstance(part, int | float) for part in parts.values()):
        raise RewardError(f"{where} is {result!r}; return a finite float, or a dict of finite floats")
    total = sum(parts.values()) if isinstance(result, Mapping) else result
    if not isinstance(total, int | float) or not math.isfinite(total):
        raise RewardError(f"{where} is {result!r}; return a finite float, or a dict of finite floats")
    return float(total), {name: float(part) for name, part in parts.items()}


async def score_in_time(
    reward: Reward, reply: Reply, ordinal: int, deadline_s: float
) -> tuple[float, dict[str, float]]:
    """`score` in a thread. Raises RewardError after `deadline_s` seconds.

    The thread is a daemon: Python would wait for any other kind at exit, and a reward that hangs would hang the run.
    """
    loop = asyncio.get_running_loop()
    judged: asyncio.Future[tuple[float, dict[str, float]]] = loop.create_future()

    def settle(result: tuple[float, dict[str, float]] | None, error: BaseException | None) -> None:
        if judged.done():
            return
        if error is None:
            judged.set_result(result)
        else:
            judged.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = score(reward, reply, ordinal)
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the run has ended, and its event loop is closed
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, daemon=True, name=f"reward of prompt {ordinal}").start()
    try:
        # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the answer.
        async with asyncio.timeout(deadline_s):
            return await judged
    except TimeoutError:
        raise RewardError(
            f"the reward of prompt {ordinal} took longer than {deadline_s:g} s (task {dict(reply.task)}, reply "
            f"{reply.text[:80]!r}); bound its work, or raise `deadlines.reward_s`"
        ) from None
