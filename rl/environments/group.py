"""What becomes of the samples of one prompt? Its episodes are played at once; one that fails is played again."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from rl.environments.types import EnvError, EnvLate
from rl.judges.hearing import JudgeError
from rl.protocols import EngineLost
from rl.types import Trajectory


@dataclass(frozen=True, kw_only=True)
class Group:
    """The samples of one prompt, or why there are none."""

    rows: list[Trajectory]
    """Without those of samples to which the reward does not apply."""
    samples: int
    failed: str = ""
    """Why the group failed, a word for the ledger's `failed(word)`; empty if it did not."""
    error: EnvError | EngineLost | None = None
    """The error that it failed with, where it has one."""
    replayed: int = 0
    """Episodes that were played again."""


async def play_group(n: int, play: Callable[[int], Awaitable[list[Trajectory]]], retries: int) -> Group:
    """Play n episodes with `play(member)`. One whose engine or environment fails is played again, `retries` times at
    most; after that the group fails, and its other episodes are given up."""
    replayed = 0

    async def member(index: int) -> list[Trajectory]:
        nonlocal replayed
        for left in range(retries, -1, -1):
            try:
                return await play(index)
            except (EngineLost, EnvError):
                if not left:
                    raise
                replayed += 1
        raise AssertionError("retries must be at least 0")

    # Not a task group: before Python 3.12 it counts its own failure as a cancellation of the task that waits for it.
    playing = [asyncio.create_task(member(index)) for index in range(n)]
    try:
        done, _ = await asyncio.wait(playing, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in playing:
            task.cancel()
        # Their environments are closed before the group ends.
        await asyncio.gather(*playing, return_exceptions=True)
    errors = [error for task in playing if task in done and (error := task.exception())]
    if not errors:
        return Group(rows=[row for task in playing for row in task.result()], samples=n, replayed=replayed)
    error = next((each for each in errors if not isinstance(each, EngineLost | EnvError)), errors[0])
    if not isinstance(error, EngineLost | EnvError):
        raise error
    return Group(rows=[], samples=n, failed=reason(error), error=error, replayed=replayed)


def reason(error: EnvError | EngineLost) -> str:
    """The ledger's word for a failure."""
    if isinstance(error, EnvLate):
        return "deadline"
    if isinstance(error, JudgeError):
        return "judge_error"
    return "env_error" if isinstance(error, EnvError) else "engine_lost"
