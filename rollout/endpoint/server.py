"""Who answers a client? An HTTP server in an engine's process, for the episodes that are open on this engine.

The address of an episode holds a secret, and loopback alone is served unless the run asks for more. Sampling goes to
the engine directly: vLLM's own chat server reports a reply that was cut off as a tool call, and no weight versions.
"""

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, Protocol

from aiohttp import web
from vllm.utils.network_utils import get_ip

from rl.agents.record import Opening, Record
from rl.config import Config
from rl.environments.template import Chat, chat_of
from rl.tokens import Rendering
from rl.types import Completion, Parsed
from rollout.endpoint import anthropic, chat, responses
from rollout.endpoint.asked import SAME, Asked, Refused, check_settings
from rollout.endpoint.episode import OpenEpisode, Reply
from rollout.parse import MOST_TOOLS, Parsers

MOST_BYTES = 16 * 2**20
"""Bytes of a request's body."""
DIALECTS: Mapping[str, ModuleType] = {"chat/completions": chat, "responses": responses, "messages": anthropic}
"""By the end of the address."""


class Served(Protocol):
    """What the server needs of its engine."""

    config: Config
    tokenizer: Any
    stop_ids: list[int]
    """Token ids that end a reply."""
    parsers: Parsers
    sample: Callable[..., Awaitable[list[Completion]]]
    """`Engine.sample`. Raises EngineLost."""


class Endpoint:
    """The server of one engine. Its `start` and `close` belong to one event loop, which is the engine's too."""

    def __init__(self, engine: Served, rendering: Rendering) -> None:
        self.config = c = engine.config
        self.rendering, self.tokenizer, self.stop_ids = rendering, engine.tokenizer, engine.stop_ids
        self.parsers = engine.parsers
        self._sample = engine.sample
        self.max_tokens, self.max_model_len = c.rollout.max_tokens, c.rollout.max_model_len
        self.model = c.model
        self.episodes: dict[str, OpenEpisode] = {}
        self._chats: dict[str, Chat] = {}
        self._runner: web.AppRunner | None = None
        self._starting = asyncio.Lock()
        self.address = ""

    async def start(self) -> None:
        """Listen on a free port; once, however many ask."""
        async with self._starting:
            if not self.address:
                await self._listen("/e/{secret}", self.config.rollout.endpoint_host, 0)

    async def _listen(self, root: str, host: str, port: int) -> None:
        app = web.Application(client_max_size=MOST_BYTES, middlewares=[_in_the_clients_form])
        for dialect in DIALECTS:
            # Clients of Anthropic add /v1 themselves, so the address with /v1 must do for them too.
            app.router.add_post(f"{root}/v1/{dialect}", self._serve)
            app.router.add_post(f"{root}/v1/v1/{dialect}", self._serve)
        for each in ("models", "models/{model:.+}", "v1/models"):
            app.router.add_get(f"{root}/v1/{each}", self._models)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=1024)
        await web.SockSite(self._runner, listener).start()
        # On all of them, it is known to others by this node's own address.
        shown = get_ip() if host in ("0.0.0.0", "::") else host
        self.address = f"http://{f'[{shown}]' if ':' in shown else shown}:{listener.getsockname()[1]}"

    async def close(self) -> None:
        """End the server and every episode."""
        for secret in list(self.episodes):
            await self.end(secret)
        if self._runner is not None:
            await self._runner.cleanup()

    def open(self, opening: Opening) -> str:
        """Serve an episode after `start`; returns its address, without /v1."""
        self.episodes[opening.secret] = OpenEpisode(opening, self)
        return f"{self.address}/e/{opening.secret}"

    async def end(self, secret: str) -> Record:
        """Refuse further requests of an episode; returns what was sampled for it."""
        return await self.episodes.pop(secret).close()

    # -- what an episode needs (`rollout.endpoint.episode.Policy`) ---------------------------------------------------

    def chat(self, tools: Sequence[Mapping[str, Any]]) -> Chat:
        """The run's chat template with these tools. Raises Refused where their calls cannot be read."""
        r, key = self.config.rollout, json.dumps(tools)
        if tools and not r.tool_parser:
            raise Refused(
                'tool calls are not read: set rollout.tool_parser, such as "hermes" (--rollout.tool-parser hermes), or '
                "describe the tools in the messages",
                setting="tools",
            )
        if key not in self._chats:
            if len(self._chats) >= MOST_TOOLS:
                self._chats.clear()
            try:  # before anything is sampled
                self.parsers.of(tools, calls=bool(tools))
            except ValueError as error:
                raise Refused(f"the parser {r.tool_parser} cannot have these tools: {error}", setting="tools") from None
            rendering = replace(self.rendering, tools=tools)
            self._chats[key] = chat_of(self.tokenizer, rendering, [*self.stop_ids, *r.stop_token_ids])
        return self._chats[key]

    async def sample(
        self, token_ids: list[int], seed: int, temperature: float | None, most: int, **more: Any
    ) -> Completion:
        """One completion of the engine; `more` are settings that a run has not."""
        seeded = seed if self.config.rollout.seeded else None
        (done,) = await self._sample(token_ids, 1, seeded, temperature, most, **more)
        return done

    def read(self, context: list[int], done: Completion, tools: Sequence[Mapping[str, Any]]) -> Parsed:
        """What the policy said, by vLLM's parsers where the run has them."""
        parser = self.parsers.of(tools, calls=bool(tools))
        if parser is None:
            return Parsed(text=self.tokenizer.decode(done.token_ids, skip_special_tokens=True))
        return parser(context, done)

    # -- HTTP --------------------------------------------------------------------------------------------------------

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        dialect, episode = dialect_of(request), self._episode(request)
        try:
            body = await body_of(request)
            self._check(episode, body)
            asked = self._asked(dialect, body, episode)
            reply = await episode.ask(asked)
        except Refused as refused:
            episode.counts["refused"][refused.setting or refused.code] += 1
            raise
        return await self._send(request, dialect, body, asked, reply)

    async def _send(
        self, request: web.Request, dialect: ModuleType, body: Mapping[str, Any], asked: Asked, reply: Reply
    ) -> web.StreamResponse:
        answer, model = reply.answering.result(), str(body.get("model") or self.model)
        if request.transport is None or request.transport.is_closing():
            return web.Response()  # nobody reads it; a client that asks again gets the same reply
        if not asked.stream:
            reply.got = True
            return web.json_response(dialect.write(answer, model))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        for name, data in dialect.events(answer, model, body):
            text = data if isinstance(data, str) else json.dumps(data)
            head = f"event: {name}\n" if name else ""
            await response.write(f"{head}data: {text}\n\n".encode(errors="replace"))
        reply.got = True
        await response.write_eof()
        return response

    async def _models(self, request: web.Request) -> web.Response:
        self._episode(request)
        one = request.match_info.get("model")
        own = {"id": one or self.model, "object": "model", "created": 0, "owned_by": "unison-rl"}
        return web.json_response(own if one else {"object": "list", "data": [own]})

    def _episode(self, request: web.Request) -> OpenEpisode:
        # By hash: the answer's delay does not tell how much of a guess is right.
        if episode := self.episodes.get(request.match_info["secret"]):
            return episode
        raise Refused("no open episode has this address", status=404, code="no_episode")

    def _check(self, episode: OpenEpisode, body: Mapping[str, Any]) -> None:
        """Raise Refused for settings that are not the run's."""
        c = self.config
        temperature = episode.opening.temperature
        own = {"temperature": c.temperature if temperature is None else temperature}
        check_settings(body, {name: own.get(name, getattr(c.rollout, name, None)) for name in (*SAME, "stop")})

    def _asked(self, dialect: ModuleType, body: Mapping[str, Any], episode: OpenEpisode) -> Asked:
        if dialect is not responses:
            return dialect.read(body)
        earlier = str(body.get("previous_response_id") or "").removeprefix("resp_")
        known = {r.answering.result().id: r for r in episode.replies.values() if r.node is not None} if earlier else {}
        if earlier and earlier not in known:
            raise Refused(f"no response has the id {earlier}", setting="previous_response_id", code="not_found")
        return responses.read(body, known[earlier].answering.result().messages if earlier else [])


def dialect_of(request: web.Request) -> ModuleType:
    """Whose client it is, by the address; OpenAI's where it may be anybody's."""
    return next((dialect for name, dialect in DIALECTS.items() if f"/v1/{name}" in request.path), chat)


@web.middleware
async def _in_the_clients_form(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every error as the client's library reads it."""
    try:
        return await handler(request)
    except Refused as error:
        refused = error
    except web.HTTPException as error:
        served = f"served are POST {', '.join(DIALECTS)} and GET models, behind /v1/"
        told = f"{request.method} {request.path.rpartition('/')[2]}: {error.reason}; {served}"
        refused = Refused(told, status=error.status, code="not_served")
    except (ConnectionError, web.RequestPayloadError):
        raise  # the client has left
    except Exception as error:  # a fault of this server: the client gets an answer, and the log the lines
        logging.getLogger(__name__).exception("a request failed")
        refused = Refused(f"{type(error).__name__}: {error}", status=500, code="server_error")
    return web.json_response(dialect_of(request).error(refused), status=refused.status)


async def body_of(request: web.Request) -> dict[str, Any]:
    """The request's JSON object. Raises Refused for anything else, and for one that is too long."""
    try:
        body = json.loads(await request.read())
    except web.HTTPRequestEntityTooLarge:
        too_long = f"the request has more than {MOST_BYTES // 2**20} MiB"
        raise Refused(too_long, status=413, code="request_too_large") from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"the request is no JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise Refused("the request is no JSON object", code="invalid_json")
    return body
