"""A model for anybody with the address: chats and external benchmarks. Nothing is kept, and nothing is trained on."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from aiohttp import web

from rl.agents.record import Opening
from rl.environments.template import Chat
from rl.typed import show
from rl.types import Completion, Parsed
from rollout.endpoint.asked import Refused, check_settings, stops_of
from rollout.endpoint.episode import OpenEpisode
from rollout.endpoint.server import Endpoint

RANGES = {"temperature": (0.0, 10.0), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "top_k": (-1, 1_000_000)}
"""Settings that a request may choose here, with their ranges."""
UNBOUNDED = 1_000_000


class PublicEndpoint(Endpoint):
    """Answers every request by itself. `key`, where it is not empty, is asked of every client."""

    key = ""

    async def serve(self, host: str, port: int, key: str) -> str:
        """Listen; returns the address, without /v1. Raises OSError for an address that cannot be had."""
        self.key = key
        await self._listen("", host, port)
        return self.address

    def _episode(self, request: web.Request) -> OpenEpisode:
        given = request.headers.get("x-api-key") or request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.key and not secrets.compare_digest(given.encode(errors="replace"), self.key.encode()):
            raise Refused("the key is missing, or another one", status=401, code="wrong_key")
        opening = Opening(secret="", seed=(secrets.randbits(31), 0, 0), turns=UNBOUNDED, tokens=None)
        return OpenEpisode(opening, Choosing(self))

    def _check(self, episode: OpenEpisode, body: Mapping[str, Any]) -> None:
        """Take the settings that a request chooses, and refuse the others. Raises Refused."""
        policy, rest = episode.policy, dict(body)
        assert isinstance(policy, Choosing)
        for name, (least, most) in RANGES.items():
            value = rest.pop(name, None)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise Refused(f"{name}={show(value)} must be from {least:g} to {most:g}", setting=name)
            policy.chosen[name] = value
        if rest.get("seed") is not None:
            # The same request has the same reply then.
            episode.opening = replace(episode.opening, seed=(0, 0, 0))
        policy.stop = list(stops_of(rest))
        check_settings(rest, {"stop": policy.stop})


class Choosing:
    """The policy as one request wants it sampled."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.max_model_len = endpoint, endpoint.max_model_len
        self.max_tokens = endpoint.max_model_len
        self.chosen: dict[str, Any] = {}
        self.stop: list[str] = []

    def chat(self, tools: Sequence[Mapping[str, Any]]) -> Chat:
        """The model's chat template with these tools."""
        return self.endpoint.chat(tools)

    async def sample(self, token_ids: list[int], seed: int, temperature: float | None, most: int) -> Completion:
        """One completion, with the settings of the request."""
        more: dict[str, Any] = dict(self.chosen)
        temperature = more.pop("temperature", temperature)
        if self.stop:
            more |= {"stop": self.stop, "detokenize": True, "skip_special_tokens": False}
        return await self.endpoint.sample(token_ids, seed, temperature, most, **more)

    def read(self, context: list[int], done: Completion, tools: Sequence[Mapping[str, Any]]) -> Parsed:
        """What the policy said."""
        return self.endpoint.read(context, done, tools)
