"""Waiting for actors: a deadline on every answer, and a message that names who is late and where it is stuck."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ray import ObjectRef
from ray.exceptions import RayError, RayTaskError

from rl.protocols import StallError
from trainer.cluster.nodes.logs import output
from trainer.cluster.ray_session import log_folder
from trainer.cluster.start_error import StartError, root_cause
from trainer.cluster.stubs import Process

R = TypeVar("R")


async def answer(
    ref: "ObjectRef[R]",
    late: str,
    deadline_s: float,
    process: Process | None = None,
    progress: Callable[[], float] = lambda: 0.0,
) -> R:
    """Await one actor's answer; StallError with `late` ({s} is the deadline) when it does not come in time.

    The time counts from now, or from when the actor last made `progress`, on the event loop's clock.
    """
    now = asyncio.get_running_loop().time
    began, waiting = now(), asyncio.ensure_future(_unwrapped(ref))
    try:
        while not waiting.done():
            left = max(began, progress()) + deadline_s - now()
            if left <= 0:
                where = f"\nIt is here:\n{await _where(process)}" if process else ""
                raise StallError(f"{late.replace('{s}', f'{deadline_s:g}')}. Logs of all actors: {log_folder()}{where}")
            # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the answer.
            await asyncio.wait({waiting}, timeout=left)
        return waiting.result()
    finally:
        waiting.cancel()


async def _where(process: Process) -> str:
    try:
        async with asyncio.timeout(10):
            return await process.stacks()
    except (TimeoutError, RayError) as error:
        return f"it does not answer ({type(error).__name__}): it is stopped or gone, or holds the interpreter's lock"


async def started(who: str, ref: "ObjectRef[None]", deadline_s: float) -> None:
    """Await an actor's object; StartError with the root cause when it cannot be built."""
    try:
        await answer(ref, f"the driver waited {{s}} s for {who} to start", deadline_s)
    except (StallError, asyncio.CancelledError):
        raise
    except Exception as error:
        # An error of the actor's own constructor has Ray's report, which holds the actor's traceback, as its cause.
        report = error.__cause__ if isinstance(error.__cause__, RayError) else error
        where, text = await output(str(report))
        raise StartError(f"{who} did not start. {root_cause(str(report), text)}\nOutput of its node: {where}") from None


async def gather_answers(
    refs: Sequence["ObjectRef[R]"], late: str, deadline_s: float, processes: Sequence[Process]
) -> list[R]:
    """Await the same question to several actors; in `late`, {i} is the index of the one that is late."""
    asking = [answer(r, late.replace("{i}", str(i)), deadline_s, processes[i]) for i, r in enumerate(refs)]
    return await asyncio.gather(*asking)


async def _unwrapped(ref: Any) -> Any:
    try:
        return await ref
    except RayTaskError as error:
        # The actor's own error, with its message alone; Ray's, which holds the traceback, is its cause.
        own: Any = error
        while isinstance(own, RayTaskError):
            own = own.cause
        raise own from error
