"""Waiting for actors: a deadline on every answer, and a message that says who is late and where it is stuck."""

import asyncio
from typing import Any

import ray

from rl.protocols import StallError
from trainer.cluster.ray_session import log_folder
from trainer.cluster.start_error import StartError, root_cause


async def answer(ref: Any, late: str, deadline_s: float, actor: Any = None) -> Any:
    """Await one actor's answer; StallError with `late` ({s} is the deadline) when it does not come in time."""
    try:
        # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the answer.
        async with asyncio.timeout(deadline_s):
            return await _unwrapped(ref)
    except TimeoutError:
        where = f"\nIt is here:\n{await _where(actor)}" if actor else ""
        raise StallError(
            f"{late.replace('{s}', f'{deadline_s:g}')}. Logs of all actors: {log_folder()}{where}"
        ) from None


async def _where(actor: Any) -> str:
    try:
        async with asyncio.timeout(10):
            return await actor.stacks.remote()
    except (TimeoutError, ray.exceptions.RayError) as error:
        return f"it does not say ({type(error).__name__}): its process is stopped, gone, or has the interpreter's lock"


async def started(who: str, ref: Any, deadline_s: float) -> None:
    """Await an actor's object; StartError with the root cause when it cannot be built."""
    try:
        await answer(ref, f"the driver waited {{s}} s for {who} to start", deadline_s)
    except ray.exceptions.RayError as error:
        cause = root_cause(str(error), log_folder())
        raise StartError(f"{who} did not start. {cause}\nOutput of all actors: {log_folder()}") from None


async def gather_answers(refs: list[Any], late: str, deadline_s: float, actors: list[Any]) -> list[Any]:
    """Await the same question to several actors; in `late`, {i} is the index of the one that is late."""
    asking = [answer(r, late.replace("{i}", str(i)), deadline_s, actors[i]) for i, r in enumerate(refs)]
    return await asyncio.gather(*asking)


async def _unwrapped(ref: Any) -> Any:
    try:
        return await ref
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
