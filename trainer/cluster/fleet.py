"""Which engines serve, and which were lost? Shared by a run's rollouts and its learner."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from rl.protocols import EngineLost, StallError
from trainer.cluster.cluster import Cluster
from trainer.cluster.start_error import StartError

ALIVE_S = 30.0
"""Seconds in which an engine must answer that it lives, after an update failed."""
LOOK_S = 5.0
"""Seconds between two looks for nodes that are drained."""


class Fleet:
    """The engines of one run. One that is lost, or new, serves when it holds the complete published version."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        most = cluster.config.rollout.most_engines
        self.gone: set[int] = set()
        """Engines whose process must be replaced."""
        self.lost: set[int] = set()
        """Those, and the started ones that do not hold the published weights yet."""
        self.started: set[int] = set()
        """Of those, the ones that are not among the cluster's engines yet."""
        self.leaving: set[int] = set()
        """Engines whose node is drained: they get no more groups."""
        self.load = [0] * most
        """Samples under way, of each engine."""
        self.restarts_of = [0] * most
        """Restarts of each engine; a late error of a replaced process has an older count and is ignored."""
        self.restarts = 0
        self.causes: list[str] = []
        """Why engines were lost, or did not start."""
        self.recover: Callable[[], Coroutine[Any, Any, None]] | None = None
        """Brings lost engines back; set by the learner's side, which has the weights."""
        self.elastic = False
        """Whether the engines follow the nodes of the cluster."""
        self._starting: dict[int, asyncio.Task[None]] = {}
        self._recovering: asyncio.Task[None] | None = None
        self._error: Exception | None = None
        """Why lost engines do not come back."""
        self._changed = asyncio.Condition()

    async def serving(self) -> list[int]:
        """Engines that serve; waits until there is one. Raises the error that keeps lost engines away."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._error or self.now())
        if self._error:
            raise self._error
        return self.now()

    def now(self) -> list[int]:
        """Engines that serve now."""
        return [i for i in self.cluster.engines if i not in self.lost and i not in self.leaving]

    def mark_lost(self, engine: int, restarts: int, cause: str) -> None:
        """A call to this engine failed because its process is gone: begin its recovery."""
        if self._mark_lost(engine, restarts, cause):
            self._wake()

    def _mark_lost(self, engine: int, restarts: int, cause: str) -> bool:
        """Whether this is news: another call may have found the same process gone, or it was replaced meanwhile."""
        if restarts != self.restarts_of[engine] or engine in self.gone:
            return False
        self.gone.add(engine)
        self.lost.add(engine)
        self.causes.append(f"engine {engine} was lost: {cause}")
        return True

    def _wake(self) -> None:
        if self.recover and (self._recovering is None or self._recovering.done()):
            self._recovering = asyncio.create_task(self._recover(), name="recover lost engines")

    async def _recover(self) -> None:
        assert self.recover is not None
        try:
            await self.recover()
        except Exception as error:
            await self._fail(error)

    def follow(self) -> None:
        """With `rollout.max_engines`, the engines follow the nodes of the cluster from now on, up to that number.

        Ray starts an engine where a node has room for it, and else once there is one. An engine whose node is drained
        gets no more groups, and ends when it has returned those that it has.
        """
        self.elastic = self.cluster.config.rollout.max_engines is not None
        for engine in range(len(self.load)):
            self._start(engine)
        if self.elastic:
            self._following = asyncio.create_task(self._follow(), name="follow the cluster's nodes")

    async def _follow(self) -> None:
        try:
            while True:
                drained = await self.cluster.drained_engines()
                self.leaving = drained & set(self.cluster.engines)
                for engine in self.leaving:
                    if not self.load[engine]:
                        self.mark_lost(engine, self.restarts_of[engine], "its node is drained")
                await asyncio.sleep(LOOK_S)
        except Exception as error:
            await self._fail(error)

    def _start(self, engine: int) -> None:
        """Begin to start an engine, unless there is one."""
        if engine not in self.cluster.engines and engine not in self._starting:
            self._starting[engine] = asyncio.create_task(self._started(engine), name=f"start engine {engine}")

    async def _started(self, engine: int) -> None:
        for _ in range(1 + self.cluster.config.rollout.restarts):
            try:
                await self.cluster.start_engine(engine)
            except Exception as error:  # one that cannot start where it is may start elsewhere
                self.causes.append(f"engine {engine} did not start: {error}")
            else:
                self.started.add(engine)
                self.lost.add(engine)
                self._wake()
                break
        del self._starting[engine]
        await self._notify()

    async def revive(self) -> None:
        """Replace the processes that are gone, all at once, and open a new weight channel. New engines hold no weights.

        An elastic fleet goes on without them, as long as there are others. Raises StartError after `rollout.restarts`
        rounds, and EngineLost when another one dies meanwhile.
        """
        most = self.cluster.config.rollout.restarts
        while self.gone:
            if self.gone - self.leaving:
                if self.restarts == most:
                    raise StartError(
                        f"{self.causes[-1]}. It was restarted {most} times already (rollout.restarts), so the run "
                        f"ends. Output of all actors: {self.cluster.logs}"
                    )
                self.restarts += 1
            replacing = [self._replace(engine) for engine in sorted(self.gone)]
            for failed in await asyncio.gather(*replacing, return_exceptions=True):
                if failed:
                    raise failed
        waits = self.cluster.config.deadlines.start_s
        try:
            async with asyncio.timeout(waits), self._changed:
                await self._changed.wait_for(lambda: self.cluster.engines or self.started or not self._starting)
        except TimeoutError:
            raise StallError(f"no engine is left, and no node had room for one within {waits:g} s") from None
        for engine in sorted(self.started):
            self.cluster.engines[engine] = self.cluster.starting.pop(engine)
        self.started.clear()
        if not self.cluster.engines:
            raise StartError(f"no engine is left. {self.causes[-1]}")
        await self.cluster.open_channel()

    async def _replace(self, engine: int) -> None:
        self.restarts_of[engine] += 1
        if self.elastic:
            self.cluster.engines.pop(engine).kill()
            self.lost.discard(engine)
            self._start(engine)
        else:
            await self.cluster.restart_engine(engine)
        self.gone.discard(engine)

    async def look_for_lost(self) -> bool:
        """After a failed update, check that every engine lives and holds complete weights; True when one does not."""
        for engine in set(self.cluster.engines) - self.gone:
            restarts = self.restarts_of[engine]
            try:
                await self.cluster.ask_engine(engine, lambda e: e.alive(), deadline_s=ALIVE_S)
            except (EngineLost, StallError) as error:
                self._mark_lost(engine, restarts, f"{error}, in a weight update")
        return bool(self.gone)

    async def mark_serving(self) -> None:
        """Every engine that is not gone holds the complete published version."""
        self.lost = self.gone | self.started
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

    async def _fail(self, error: Exception) -> None:
        self._error = error
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
