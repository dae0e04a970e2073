"""How a reply is scored: the user's reward function, its deadline, and errors that name the prompt."""

import asyncio
import concurrent.futures
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, SupportsFloat

import numpy as np
from torch import Tensor

from rl.rewards.clock import RewardClock
from rl.typed import shortened
from rl.types import Completion, Prompt, Reply

Score = SupportsFloat | Mapping[str, SupportsFloat]
"""A number (numpy and torch scalars too), or named parts that are added up."""
Reward = Callable[[Reply], Score | Awaitable[Score]]
"""Takes one reply, returns its score. It runs in a thread of the driver; if it is `async`, it is awaited on an event
loop that all rewards share and that is not the driver's, so a blocking call in it delays other rewards only."""


class RewardError(RuntimeError):
    """The reward function failed. It never turns into a reward of 0: that would teach the policy the bug."""


def reply_to(prompt: Prompt, completion: Completion, decode: Callable[..., str]) -> Reply:
    """What a reward sees of one completion. `decode` turns token ids into text without special tokens."""
    return Reply(
        text=decode(completion.token_ids),
        finished=completion.finish_reason == "stop",
        task=prompt.task,
        token_ids=completion.token_ids,
        prompt=prompt.given,
        prompt_token_ids=prompt.token_ids,
        decode=decode,
    )


def number(value: Any) -> float | None:
    """A Python, numpy or torch number as a float; None for everything else. One element of a tensor is a number."""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        size = value.numel() if isinstance(value, Tensor) else value.size
        value = value.item() if size == 1 else None
    return float(value) if isinstance(value, int | float) else None


def parts_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Named parts as floats. Raises TypeError for a part that is no number."""
    parts = {str(name): number(part) for name, part in result.items()}
    if wrong := [name for name, part in parts.items() if part is None]:
        raise TypeError(f"the part {wrong[0]!r} is {result[wrong[0]]!r}, not a number")
    return {name: part for name, part in parts.items() if part is not None}


def score(
    reward: Reward,
    reply: Reply,
    ordinal: int,
    *,
    awaiting: Callable[[concurrent.futures.Future[Any]], object] = lambda future: None,
    clock: RewardClock | None = None,
) -> tuple[float, dict[str, float]]:
    """Reward and its parts. Raises RewardError, naming the prompt, when the function raises or returns no number.

    Blocks until an `async` reward has its answer; `awaiting` gets the future of it, which can be cancelled. `clock`
    measures the call.
    """
    clock = clock or RewardClock()
    try:
        with clock.working():
            result = reward(reply)
        if inspect.isawaitable(result):
            future = asyncio.run_coroutine_threadsafe(clock.awaited(_awaited(result)), _reward_loop())
            awaiting(future)
            result = future.result()
    except Exception as error:
        raise RewardError(
            f"the reward of prompt {ordinal} {_shown(reply)} raised {type(error).__name__}: "
            f"{shortened(str(error), 1000)}"
        ) from error
    numbers = {k: number(v) for k, v in result.items()} if isinstance(result, Mapping) else {"": number(result)}
    parts = {name: part for name, part in numbers.items() if part is not None}
    total = sum(parts.values())
    if not parts or len(parts) < len(numbers) or not math.isfinite(total):
        raise RewardError(
            f"the reward of prompt {ordinal} {_shown(reply)} is {shortened(repr(result), 200)}; return a finite float, "
            "or a dict of finite floats"
        )
    return total, parts if isinstance(result, Mapping) else {}


def _shown(reply: Reply) -> str:
    """What a reward saw, for a message. A task may hold megabytes of test cases."""
    return f"(task {shortened(repr(dict(reply.task)), 400)}, reply {reply.text[:80]!r})"


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


@cache
def _reward_loop() -> asyncio.AbstractEventLoop:
    """The event loop of all `async` rewards: one, so that they can share a client and its connections."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="async rewards").start()
    return loop


async def score_in_time(
    reward: Reward, reply: Reply, ordinal: int, deadline_s: float
) -> tuple[float, dict[str, float]]:
    """`score` in a thread. Raises RewardError after `deadline_s` seconds; an `async` reward is then cancelled.

    The clock starts when the call runs, and stands still while other rewards compute. The thread is a daemon: at exit
    Python would wait for any other kind, and a reward that hangs would hang the run.
    """
    loop = asyncio.get_running_loop()
    scored: asyncio.Future[tuple[float, dict[str, float]]] = loop.create_future()
    awaited: list[concurrent.futures.Future[Any]] = []
    clocks: list[RewardClock] = []
    """The call's clock, once it runs."""

    def settle(result: tuple[float, dict[str, float]] | None, error: BaseException | None) -> None:
        if scored.done():
            return
        if error is None:
            scored.set_result(result)
        else:
            scored.set_exception(error)

    def work() -> None:
        result, error = None, None
        clocks.append(RewardClock())
        try:
            result = score(reward, reply, ordinal, awaiting=awaited.append, clock=clocks[0])
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the run has ended, and its event loop is closed
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, daemon=True, name=f"reward of prompt {ordinal}").start()
    try:
        while not scored.done():
            left = deadline_s - (clocks[0].seconds() if clocks else 0.0)
            if left <= 0:
                raise RewardError(
                    f"the reward of prompt {ordinal} took longer than {deadline_s:g} s {_shown(reply)}; bound its "
                    "work, or raise `deadlines.reward_s`"
                )
            # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the answer.
            await asyncio.wait({scored}, timeout=max(left, 0.01))
        return scored.result()
    finally:
        scored.cancel()  # nobody reads what comes later
        for future in awaited:
            future.cancel()
