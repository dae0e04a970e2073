"""Which tokens does a request stand for? One open episode: its requests become turns of a token tree.

A request that begins with a conversation which we returned goes on from the tokens that were sampled for it, and adds
what its new messages add. Any other one begins a new branch, which is rendered, and is counted with the reason.
"""

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rl.agents.record import Limit, Opening, Record, sampled_of
from rl.environments.messages import canonical, find
from rl.environments.observations import spoken
from rl.environments.template import Chat, TemplateError
from rl.environments.tree import Node, Tree
from rl.environments.types import Messages
from rl.protocols import EngineLost
from rl.types import Call, Completion, Parsed
from rollout.endpoint.asked import Answer, Asked, Refused


class Policy(Protocol):
    """What an episode needs of the engine."""

    max_tokens: int
    """Most tokens of one reply."""
    max_model_len: int

    def chat(self, tools: Sequence[Mapping[str, Any]]) -> Chat:
        """The run's chat template with these tools. Raises Refused where the run cannot have tools."""
        ...

    async def sample(self, token_ids: list[int], seed: int, temperature: float | None, most: int) -> Completion:
        """One completion. Raises EngineLost."""
        ...

    def read(self, context: list[int], done: Completion, tools: Sequence[Mapping[str, Any]]) -> Parsed:
        """What the policy said."""
        ...


@dataclass(eq=False)
class Reply:
    """One request and what became of it."""

    answering: asyncio.Task[Answer]
    node: Node | None = None
    got: bool = False
    """Whether a client has received the answer."""


@dataclass(frozen=True)
class History:
    """A conversation, of which digests are kept: a request holds all of it again."""

    tools: str
    messages: tuple[str, ...]
    beginnings: tuple[str, ...]
    """For each message, of the conversation up to there."""

    @classmethod
    def of(cls, asked: Asked) -> "History":
        """That of a request."""
        empty = cls(_digest(asked.tools), (), ())
        return empty.then(*asked.messages)

    def then(self, *messages: Mapping[str, Any]) -> "History":
        """The conversation with more messages."""
        digests, last = [_digest(message) for message in messages], (self.beginnings or (self.tools,))[-1]
        beginnings = [last := _sha256(last + digest) for digest in digests]
        return History(self.tools, (*self.messages, *digests), (*self.beginnings, *beginnings))


@dataclass
class OpenEpisode:
    """One episode that an agent is playing."""

    opening: Opening
    policy: Policy
    tree: Tree = field(default_factory=Tree)
    replies: dict[str, Reply] = field(default_factory=dict[str, Reply])
    """By the digest of the request."""
    histories: dict[str, tuple[Node, History]] = field(default_factory=dict[str, tuple[Node, History]])
    """The conversations that were returned, by their digest."""
    counts: dict[str, Counter[str]] = field(
        default_factory=lambda: {kind: Counter[str]() for kind in ("dropped", "branches", "refused")}
    )
    limit: Limit | None = None
    lost: str = ""
    ended: bool = False
    turns: int = 0
    tokens: int = 0
    """Requests that were sampled, and tokens that were sampled or are set aside for requests in flight."""

    async def ask(self, asked: Asked) -> Reply:
        """The reply to a request, which has been sampled when this returns; the same one to the same request. Raises
        Refused. A caller that goes away does not end the sampling: its client may ask again."""
        if self.ended:
            raise Refused("the episode has ended", status=410, code="episode_ended")
        history = History.of(asked)
        key = _sha256(f"{history.beginnings[-1]} {asked.max_tokens} {asked.seed} {asked.stop}")
        reply = self.replies.get(key)
        if reply is None:
            answering = asyncio.create_task(self._answer(key, asked, history))
            reply = self.replies[key] = Reply(answering)
        try:
            await asyncio.shield(reply.answering)
        except Refused:
            # Nothing was sampled, so the same request may be made again.
            self.replies.pop(key, None)
            raise
        except EngineLost as error:
            self.lost = str(error)
            raise Refused(f"the engine was lost: {error}", status=503, code="engine_lost") from None
        except asyncio.CancelledError:
            if self.ended:
                raise Refused("the episode has ended", status=410, code="episode_ended") from None
            raise
        return reply

    async def _answer(self, key: str, asked: Asked, history: History) -> Answer:
        chat = self.policy.chat(asked.tools)
        parent, fresh = self._continued(history)
        messages = named(asked.messages)
        if messages[-1]["role"] == "assistant":
            raise Refused("the last message is the assistant's: end with what it answers", setting="messages")
        path = parent.path() if parent else []
        before = [token for node in path for token in (*node.delta, *node.completion.token_ids)]
        try:
            delta = chat.delta(messages[fresh:], path[-1].completion.token_ids) if path else _prompt(chat, messages)
        except ValueError as error:  # of the chat template, or of a text that is none
            raise Refused(str(error), setting="messages") from None
        context = [*before, *delta]
        room = self._room(context, asked)
        self.turns, self.tokens, turn = self.turns + 1, self.tokens + room, self.turns
        try:
            seed = _seed(*self.opening.seed, asked.seed, context)
            done = await self.policy.sample(context, seed, self.opening.temperature, room)
        finally:
            self.tokens -= room
        if done.finish_reason == "abort":
            raise EngineLost("vLLM aborted a request")
        self.tokens += len(done.token_ids)
        node = self.tree.put(parent, delta, done, turn) if parent else self.tree.add(context, done, turn)
        self.replies[key].node = node
        parsed = self.policy.read(context, done, asked.tools)
        finished = done.finish_reason == "stop"
        calls = [] if not finished else _with_ids(parsed.calls, key)
        ends = {parsed.text.find(text): text for text in asked.stop if text in parsed.text}
        first = min(ends, default=None)
        text, stop = parsed.text[:first], None if first is None else ends[first]
        said = spoken(text, calls)
        returned = history.then(said)
        self.histories[returned.beginnings[-1]] = node, returned
        return Answer(
            id=key[:24],
            created=int(time.time()),
            text=text,
            reasoning=parsed.reasoning,
            calls=tuple(calls),
            finished=finished,
            stop=stop,
            prompt_tokens=len(context),
            cached_tokens=done.cached_prompt_tokens,
            completion_tokens=len(done.token_ids),
            messages=[*asked.messages, said],
        )

    def _continued(self, asked: History) -> tuple[Node | None, int]:
        """The turn that a request goes on from, and how many messages both have; else it is a branch, with a reason."""
        for length in range(len(asked.messages), 0, -1):
            if known := self.histories.get(asked.beginnings[length - 1]):
                return known[0], length
        if kept := [history for _, history in self.histories.values()]:
            match = find(asked.messages, [h.messages for h in kept], asked.tools, [h.tools for h in kept])
            related = not {message for history in kept for message in history.messages}.isdisjoint(asked.messages)
            self.counts["branches"][match.reason or "tools" if related else "new"] += 1
        return None, 0

    def _room(self, context: list[int], asked: Asked) -> int:
        """Most tokens of the reply. Raises Refused where a limit of the episode is reached."""
        o, p = self.opening, self.policy
        if self.turns >= o.turns:
            raise self._over("turns", f"the episode has made {o.turns} requests (limits.turns)", "limits.turns")
        if o.tokens is not None and self.tokens >= o.tokens:
            raise self._over("length", f"the episode has sampled {o.tokens} tokens (limits.tokens)", "limits.tokens")
        if len(context) >= p.max_model_len:
            raise self._over(
                "length",
                f"the conversation has {len(context)} tokens, and a context has {p.max_model_len} "
                "(rollout.max_model_len)",
                "messages",
                code="context_length_exceeded",
            )
        most = min(p.max_tokens, p.max_model_len - len(context), asked.max_tokens or p.max_tokens)
        return most if o.tokens is None else min(most, o.tokens - self.tokens)

    def _over(self, limit: Limit, message: str, setting: str, code: str = "limit_reached") -> Refused:
        self.limit = self.limit or limit
        return Refused(message, setting=setting, code=code)

    async def close(self) -> Record:
        """End the episode, and what is being sampled for it."""
        self.ended = True
        flying = [reply.answering for reply in self.replies.values() if not reply.answering.done()]
        for task in flying:
            task.cancel()
        await asyncio.gather(*flying, return_exceptions=True)
        if flying:
            self.counts["dropped"]["in_flight_requests"] += len(flying)
        self._drop_unread()
        counts = {kind: dict(each) for kind, each in self.counts.items()}
        return Record(sampled=sampled_of(self.tree.nodes), limit=self.limit, lost=self.lost, **counts)

    def _drop_unread(self) -> None:
        """Take out replies that no client has received and nothing goes on from: they did nothing in the episode."""
        unread = [reply.node for reply in self.replies.values() if reply.node is not None and not reply.got]
        for node in sorted(unread, key=self.tree.nodes.index, reverse=True):
            if not node.children:
                self.counts["dropped"]["unread"] += len(node.completion.token_ids)
                self.tree.drop(node)


def named(messages: Messages) -> Messages:
    """The messages, with the name of the call in each result of a tool: some templates write it."""
    names = {c["id"]: c["function"]["name"] for m in messages for c in m.get("tool_calls", ())}
    return [m if "name" in m or m.get("tool_call_id") not in names else {**m, "name": names[m["tool_call_id"]]}
            for m in messages]  # fmt: skip


def _prompt(chat: Chat, messages: Messages) -> list[int]:
    """A whole conversation in tokens. Some templates take the arguments of calls as an object, others as text."""
    try:
        return chat.prompt(messages)
    except TemplateError:
        as_text = [_text_arguments(message) for message in messages]
        if as_text == messages:
            raise
        return chat.prompt(as_text)


def _text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = [{**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}}
             for c in message["tool_calls"]]  # fmt: skip
    return {**message, "tool_calls": calls}


def _with_ids(calls: Sequence[Call], key: str) -> list[Call]:
    """The calls with an id each: the parser's, or nine letters and digits, which every template takes."""
    return [replace(c, id=c.id or f"{key[:7]}{i:02d}") for i, c in enumerate(calls)]


def _digest(part: Any) -> str:
    return _sha256(json.dumps(canonical(part), sort_keys=True, default=str))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _seed(run: int, ordinal: int, member: int, own: int | None, context: list[int]) -> int:
    """The seed of a request. It depends on what is asked and not on when, so requests side by side are repeatable."""
    digest = hashlib.sha256(json.dumps([run, ordinal, member, own, context]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
