"""How a reply is scored: the user's reward function, its deadline, and errors that name the prompt."""

import asyncio
import concurrent.futures
import inspect
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import copy_context
from typing import Any, overload

from rl.judges.hearing import JudgeError, hear
from rl.judges.loops import awaited, awaited_on
from rl.rewards.clock import RewardClock
from rl.rewards.combined import OverGroup, Weighted, judges_groups
from rl.rewards.result import RIGHT_FORM, NoScore, Points, Score, points, rows_of
from rl.typed import shortened, show
from rl.types import Completion, Prompt, Reply

Awaiting = Callable[[concurrent.futures.Future[Any]], object]
Reward = Callable[[Reply], Score | Awaitable[Score]] | OverGroup | Weighted
"""Takes one reply, returns its score. It runs in a thread of the driver; if it is `async`, it is awaited on an event
loop that all rewards share and that is not the driver's, so a blocking call in it delays other rewards only."""
Asked = Reply | list[Reply]
"""What a reward is called with: one reply, or all replies of a group."""
SHOWN = 180
"""About how many characters of a task, or of an error, are in a message."""


class RewardError(RuntimeError):
    """The reward function failed. It never turns into a reward of 0: that would teach the policy the bug."""


def reply_to(prompt: Prompt, completion: Completion, decode: Callable[..., str]) -> Reply:
    """What a reward sees of one completion. `decode` turns token ids into text without special tokens."""
    token_ids = [*completion.token_ids]  # a list, for users compare it with lists
    return Reply(
        text=decode(token_ids),
        finished=completion.finish_reason == "stop",
        task=prompt.task,
        token_ids=token_ids,
        prompt=prompt.given,
        prompt_token_ids=prompt.token_ids,
        decode=decode,
    )


@overload
def score(
    reward: Reward, asked: Reply, ordinal: int, *, awaiting: Awaiting = ..., clock: RewardClock | None = ...
) -> Points: ...
@overload
def score(
    reward: Reward, asked: list[Reply], ordinal: int, *, awaiting: Awaiting = ..., clock: RewardClock | None = ...
) -> list[Points]: ...
def score(
    reward: Reward,
    asked: Asked,
    ordinal: int,
    *,
    awaiting: Awaiting = lambda future: None,
    clock: RewardClock | None = None,
) -> Points | list[Points]:
    """Reward and its parts of one reply, or of each reply of a group.

    Raises RewardError, naming the prompt, when the function raises or returns no score, and the JudgeError of a judge.
    Blocks until an `async` reward has its answer; `awaiting` gets the future of it, which can be cancelled. `clock`
    measures the call.
    """
    clock = clock or RewardClock()
    try:
        ask: Any = reward
        with clock.working():
            result = ask(asked)
        if inspect.isawaitable(result):
            future = awaited_on("async rewards", clock.awaited(awaited(result)))
            awaiting(future)
            result = future.result()
        if isinstance(asked, list):
            return [points(each) for each in rows_of(result, len(asked))]
        return points(result)
    except NoScore as error:
        raise RewardError(
            f"the reward of prompt {ordinal} {shown(asked)} {_with_notes(error)}; {RIGHT_FORM}"
        ) from error
    except JudgeError:
        raise
    except Exception as error:  # the user's function may raise anything
        raised = f"raised {type(error).__name__}: {_with_notes(error)}"
        raise RewardError(f"the reward of prompt {ordinal} {shown(asked)} {raised}") from error


def shown(asked: Asked) -> str:
    """What a reward was called with, for an error: short, however large the task."""
    first, replies = (asked[0], f"{len(asked)} replies, the first") if isinstance(asked, list) else (asked, "reply")
    return f"(task {show(dict(first.task), SHOWN)}, {replies} {show(first.text[:80], SHOWN)})"


def _with_notes(error: Exception) -> str:
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return shortened(str(error), SHOWN) + shortened(notes, SHOWN)


async def score_all(
    reward: Reward, replies: list[Reply], score_one: Callable[[Reward, Asked], Awaitable[Any]]
) -> list[Points]:
    """The points of every reply of a group: `score_one` is called with each reply, or once with all of them."""
    if judges_groups(reward):
        return await score_one(reward, replies)
    scoring = [asyncio.ensure_future(score_one(reward, reply)) for reply in replies]
    try:
        return list(await asyncio.gather(*scoring))
    finally:
        for task in scoring:
            task.cancel()  # of a group that has failed, nobody needs the others


async def score_in_time(reward: Reward, asked: Asked, ordinal: int, deadline_s: float) -> Any:
    """`score` in a thread. Raises RewardError after `deadline_s` seconds; an `async` reward is then cancelled.

    The clock starts when the call runs, and stands still while other rewards compute and while the call waits for a
    judge. The thread is a daemon: at exit Python would wait for any other kind, and a reward that hangs would hang the
    run.
    """
    loop = asyncio.get_running_loop()
    scored: asyncio.Future[Points | list[Points]] = loop.create_future()
    awaited: list[concurrent.futures.Future[Any]] = []
    clocks: list[RewardClock] = []
    """The call's clock, once it runs."""

    def settle(result: Points | list[Points] | None, error: BaseException | None) -> None:
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
            result = score(reward, asked, ordinal, awaiting=awaited.append, clock=clocks[0])
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the run has ended, and its event loop is closed
            loop.call_soon_threadsafe(settle, result, error)

    with hear() as heard:
        context = copy_context()
    threading.Thread(target=context.run, args=(work,), daemon=True, name=f"reward of prompt {ordinal}").start()
    try:
        while not scored.done():
            left = deadline_s - (clocks[0].seconds() if clocks else 0.0) + heard.waited()
            if left <= 0:
                raise RewardError(
                    f"the reward of prompt {ordinal} took longer than {deadline_s:g} s {shown(asked)}; bound its "
                    "work, or raise `deadlines.reward_s`"
                )
            # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the answer.
            await asyncio.wait({scored}, timeout=max(left, 0.01))
        return scored.result()
    finally:
        scored.cancel()  # nobody reads what comes later
        for future in awaited:
            future.cancel()
