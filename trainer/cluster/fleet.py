"""Which engines serve, and which were lost? Shared by a run's rollouts and its learner."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from rl.protocols import EngineLost, StallError
from trainer.cluster.cluster import Cluster
from trainer.cluster.start_error import StartError

ALIVE_S = 30.0
"""Seconds in which an engine must answer that it lives, after an update failed."""


class Fleet:
    """The engines of one run. A lost engine serves again when it holds the complete published version."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.gone: set[int] = set()
        """Engines whose process must be replaced."""
        self.lost: set[int] = set()
        """Those, and the restarted ones that do not hold the published weights yet."""
        self.restarts_of = [0] * len(cluster.engines)
        """Restarts of each engine; a late error of a replaced process has an older count and is ignored."""
        self.restarts = 0
        self.causes: list[str] = []
        """Why engines were lost."""
        self.recover: Callable[[], Coroutine[Any, Any, None]] | None = None
        """Brings lost engines back; set by the learner's side, which has the weights."""
        self._recovering: asyncio.Task[None] | None = None
        self._error: Exception | None = None
        """Why lost engines do not come back."""
        self._changed = asyncio.Condition()

    async def serving(self) -> list[int]:
        """Engines that serve; waits until there is one. Raises the error that keeps lost engines away."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._error or len(self.lost) < len(self.restarts_of))
        if self._error:
            raise self._error
        return [i for i in range(len(self.restarts_of)) if i not in self.lost]

    def mark_lost(self, engine: int, restarts: int, cause: str) -> None:
        """A call to this engine failed because its process is gone: begin its recovery."""
        idle = self._recovering is None or self._recovering.done()
        if self._mark_lost(engine, restarts, cause) and self.recover and idle:
            self._recovering = asyncio.create_task(self._recover(), name="recover lost engines")

    def _mark_lost(self, engine: int, restarts: int, cause: str) -> bool:
        """Whether this is news: another call may have found the same process gone, or it was replaced meanwhile."""
        if restarts != self.restarts_of[engine] or engine in self.gone:
            return False
        self.gone.add(engine)
        self.lost.add(engine)
        self.causes.append(f"engine {engine} was lost: {cause}")
        return True

    async def _recover(self) -> None:
        assert self.recover is not None
        try:
            await self.recover()
        except Exception as error:
            self._error = error
            await self._notify()

    async def revive(self) -> None:
        """Replace the processes that are gone, all at once, and open a new weight channel. New engines hold no weights.

        Raises StartError after `rollout.restarts` rounds, and EngineLost when another one dies meanwhile.
        """
        most = self.cluster.config.rollout.restarts
        while self.gone:
            if self.restarts == most:
                raise StartError(
                    f"{self.causes[-1]}. It was restarted {most} times already (rollout.restarts), so the run ends. "
                    f"Output of all actors: {self.cluster.logs}"
                )
            self.restarts += 1
            replacing = [self._replace(engine) for engine in sorted(self.gone)]
            for failed in await asyncio.gather(*replacing, return_exceptions=True):
                if failed:
                    raise failed
        await self.cluster.open_channel()

    async def _replace(self, engine: int) -> None:
        self.restarts_of[engine] += 1
        await self.cluster.restart_engine(engine)
        self.gone.discard(engine)

    async def look_for_lost(self) -> bool:
        """After a failed update, check that every engine lives and holds complete weights; True when one does not."""
        for engine in set(range(len(self.restarts_of))) - self.gone:
            restarts = self.restarts_of[engine]
            try:
                await self.cluster.ask_engine(engine, lambda e: e.alive(), deadline_s=ALIVE_S)
            except (EngineLost, StallError) as error:
                self._mark_lost(engine, restarts, f"{error}, in a weight update")
        return bool(self.gone)

    async def mark_serving(self) -> None:
        """Every engine that is not gone holds the complete published version."""
        self.lost = set(self.gone)
        self._error = None
        await self._notify()

    async def counters(self) -> list[dict[str, int]]:
        """Counters of the serving engines."""
        found = []
        for engine in await self.serving():
            restarts = self.restarts_of[engine]
            try:
                found.append(await self.cluster.ask_engine(engine, lambda e: e.counters(), deadline_s=ALIVE_S))
            except EngineLost as error:
                self._mark_lost(engine, restarts, str(error))
        return found

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
