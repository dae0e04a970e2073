"""Which engines serve, and which were lost? Shared by a run's rollouts and its learner."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from rl.protocols import EngineLost, StallError
from trainer.cluster.cluster import Cluster
from trainer.cluster.start_error import StartError

ALIVE_S = 30.0
"""Seconds in which an engine must say that it lives, after an update failed."""


class Fleet:
    """The engines of one run. A lost engine serves again once it holds the whole of the published version."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.gone: set[int] = set()
        """Engines whose process must be replaced."""
        self.lost: set[int] = set()
        """Those, and the ones that were started again and do not hold the published weights yet."""
        self.births = [0] * len(cluster.engines)
        """How often each engine was started again; tells an old process's last words from its successor's."""
        self.restarts = 0
        self.causes: list[str] = []
        """Why engines were lost, in words."""
        self.mend: Callable[[], Coroutine[Any, Any, None]] | None = None
        """Brings the lost engines back; set by the learner's side, which has the weights."""
        self._mending: asyncio.Task[None] | None = None
        self._error: Exception | None = None
        """Why they do not come back."""
        self._changed = asyncio.Condition()

    async def serving(self) -> list[int]:
        """Engines that serve; waits until there is one. Raises what went wrong when none comes back."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._error or len(self.lost) < len(self.births))
        if self._error:
            raise self._error
        return [i for i in range(len(self.births)) if i not in self.lost]

    def lose(self, engine: int, birth: int, cause: str) -> None:
        """A call to this engine failed because its process is gone: begin to bring it back."""
        if birth != self.births[engine] or engine in self.gone:
            return
        self._lose(engine, cause)
        if self.mend and (self._mending is None or self._mending.done()):
            self._mending = asyncio.create_task(self._mend(), name="bring back lost engines")

    def _lose(self, engine: int, cause: str) -> None:
        self.gone.add(engine)
        self.lost.add(engine)
        self.causes.append(f"engine {engine} was lost: {cause}")

    async def _mend(self) -> None:
        assert self.mend is not None
        try:
            await self.mend()
        except Exception as error:
            self._error = error
            await self._tell()

    async def revive(self) -> None:
        """New processes for the engines that are gone, and a new weight channel to all. They hold no weights yet.

        Raises StartError after `rollout.restarts` rounds, and EngineLost when another one dies meanwhile.
        """
        most = self.cluster.config.rollout.restarts
        while self.gone:
            if self.restarts == most:
                raise StartError(
                    f"{self.causes[-1]}. It is not started again, for that was done {most} times (rollout.restarts). "
                    f"Output of all actors: {self.cluster.logs}"
                )
            self.restarts += 1
            for engine in sorted(self.gone):
                self.births[engine] += 1
                await self.cluster.restart_engine(engine)
                self.gone.discard(engine)
        await self.cluster.open_channel()

    async def look_for_lost(self) -> bool:
        """Ask every engine whether it lives and holds whole weights, after an update failed; True when one does not."""
        for engine in set(range(len(self.births))) - self.gone:
            try:
                await self.cluster.ask_engine(engine, "alive", deadline_s=ALIVE_S)
            except (EngineLost, StallError) as error:
                self._lose(engine, f"{error}, in a weight update")
        return bool(self.gone)

    async def back(self) -> None:
        """Every engine that is not gone holds the whole of the published version."""
        self.lost = set(self.gone)
        self._error = None
        await self._tell()

    async def counters(self) -> list[dict[str, int]]:
        """What the serving engines counted."""
        found = []
        for engine in await self.serving():
            try:
                found.append(await self.cluster.ask_engine(engine, "counters", deadline_s=ALIVE_S))
            except EngineLost as error:
                self._lose(engine, str(error))
        return found

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
