"""What does an engine serve over HTTP? The episodes of agents, or everybody."""

from rl.agents.record import Opening, Record
from rl.tokens import Rendering
from rollout.endpoint.public import PublicEndpoint
from rollout.endpoint.server import Endpoint, Served


class Serving(Served):
    """The methods of `rollout.engine.Engine` that serve. Its server starts with the first episode."""

    endpoint: Endpoint | None = None

    async def open_episode(self, opening: Opening, rendering: Rendering) -> str:
        """Serve an agent's episode over HTTP; returns its address, without /v1."""
        if self.endpoint is None:
            self.endpoint = Endpoint(self, rendering)
        await self.endpoint.start()
        return self.endpoint.open(opening)

    async def serve(self, rendering: Rendering, host: str, port: int, key: str) -> str:
        """Answer whoever has the address and the key; returns the address, without /v1."""
        self.endpoint = public = PublicEndpoint(self, rendering)
        return await public.serve(host, port, key)

    async def end_episode(self, secret: str) -> Record:
        """Refuse further requests of an episode; returns what was sampled for it."""
        assert self.endpoint is not None, "an episode is opened first"
        return await self.endpoint.end(secret)

    async def end_serving(self) -> None:
        """End the server, where there is one."""
        if self.endpoint is not None:
            await self.endpoint.close()
