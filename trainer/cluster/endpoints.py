"""The agents' side of the engines: which engine serves an episode, and what was sampled for it."""

import asyncio
from urllib.request import ProxyHandler, build_opener

from rl.agents.record import Opening, Record
from rl.protocols import EngineLost
from rl.tokens import Rendering
from trainer.cluster.remote import RemoteRollouts

REACH_S = 20.0
"""Seconds in which an engine must answer from where the agents run."""


class RemoteEndpoints:
    """`rl.agents.play.Endpoints` over the engines. An episode stays with one: its cache holds the history."""

    def __init__(self, rollouts: RemoteRollouts, rendering: Rendering) -> None:
        self.rollouts, self.rendering = rollouts, rendering
        self.restarts: dict[str, int] = {}
        """How often the engine of each open episode had been restarted when it was opened."""
        self.reached: set[str] = set()
        """Addresses of engines that were reached from here."""

    async def open(self, opening: Opening) -> tuple[int, str]:
        """Serve an episode on the engine with the least work. Raises EngineLost."""
        load, fleet = self.rollouts.load, self.rollouts.fleet
        engine = min(await fleet.serving(), key=load.__getitem__)
        load[engine] += 1
        self.restarts[opening.secret] = fleet.restarts_of[engine]
        try:
            deadline = fleet.cluster.config.deadlines.sample_s
            ask = fleet.cluster.ask_engine
            address = await ask(engine, lambda e: e.open_episode(opening, self.rendering), deadline_s=deadline)
            if address.rpartition("/e/")[0] not in self.reached:
                await self._reach(engine, address)
            return engine, address
        except BaseException as error:
            self._left(engine, opening.secret, error)
            raise

    async def end(self, engine: int, secret: str) -> Record:
        """End it there. Raises EngineLost where that engine's process is gone, and with it what was sampled."""
        fleet, error = self.rollouts.fleet, None
        try:
            if fleet.restarts_of[engine] != self.restarts[secret]:
                raise EngineLost(f"engine {engine} was restarted while it served an episode")
            deadline = fleet.cluster.config.deadlines.sample_s
            return await fleet.cluster.ask_engine(engine, lambda e: e.end_episode(secret), deadline_s=deadline)
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._left(engine, secret, error)

    async def _reach(self, engine: int, address: str) -> None:
        place = address.rpartition("/e/")[0]
        try:
            await asyncio.to_thread(reach, address)
        except OSError as error:
            # One that has just died is lost, and not out of reach.
            await self.rollouts.cluster.ask_engine(engine, lambda e: e.alive(), deadline_s=REACH_S)
            raise ValueError(
                f"engine {engine} serves agents at {place}, which this machine cannot reach ({error}): if it is on "
                'another node, set rollout.endpoint_host="0.0.0.0"'
            ) from error
        self.reached.add(place)

    def _left(self, engine: int, secret: str, error: BaseException | None) -> None:
        self.rollouts.load[engine] -= 1
        restarts = self.restarts.pop(secret)
        if isinstance(error, EngineLost):
            self.rollouts.fleet.mark_lost(engine, restarts, str(error))


def reach(address: str) -> None:
    """Ask an episode's address for its models, without a proxy. Raises OSError."""
    build_opener(ProxyHandler({})).open(f"{address}/v1/models", timeout=REACH_S).close()
