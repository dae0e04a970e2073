"""The agents' side of the engines: which engine serves an episode, and what was sampled for it."""

from rl.agents.record import Opening, Record
from rl.protocols import EngineLost
from rl.tokens import Rendering
from trainer.cluster.remote import RemoteRollouts


class RemoteEndpoints:
    """`rl.agents.play.Endpoints` over the engines. An episode stays with one: its cache holds the history."""

    def __init__(self, rollouts: RemoteRollouts, rendering: Rendering) -> None:
        self.rollouts, self.rendering = rollouts, rendering
        self.restarts: dict[str, int] = {}
        """How often the engine of each open episode had been restarted when it was opened."""

    async def open(self, opening: Opening) -> tuple[int, str]:
        """Serve an episode on the engine with the least work. Raises EngineLost."""
        load, fleet = self.rollouts.load, self.rollouts.fleet
        engine = min(await fleet.serving(), key=load.__getitem__)
        load[engine] += 1
        self.restarts[opening.secret] = fleet.restarts_of[engine]
        try:
            deadline = fleet.cluster.config.deadlines.sample_s
            ask = fleet.cluster.ask_engine
            return engine, await ask(engine, lambda e: e.open_episode(opening, self.rendering), deadline_s=deadline)
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

    def _left(self, engine: int, secret: str, error: BaseException | None) -> None:
        self.rollouts.load[engine] -= 1
        restarts = self.restarts.pop(secret)
        if isinstance(error, EngineLost):
            self.rollouts.fleet.mark_lost(engine, restarts, str(error))
