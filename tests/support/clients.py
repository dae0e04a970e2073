"""An endpoint without an engine: a policy that draws its replies, and keeps what it was asked."""

import asyncio
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rl.agents.record import Opening
from rl.config import Config, RolloutConfig
from rl.protocols import EngineLost
from rl.tokens import Rendering
from rl.types import Call, Completion, Data, Parsed
from rollout.endpoint.public import PublicEndpoint
from rollout.endpoint.server import Endpoint
from tiny_tokenizer import make_tokenizer

TEMPLATE = (
    "{% if tools %}tools{% for t in tools %} {{ t['function']['name'] }}{% endfor %}<end>{% endif %}"
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}CALL {{ c['function']['name'] }} {{ c['function']['arguments'] | tojson }}"
    "{% endfor %}<end>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
END = 3
CALL = re.compile(r"CALL (\w+) (\{.*\})")
ADD = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}


class Engine:
    """Draws replies, or says the texts that it is given, one after the other."""

    def __init__(self, tokenizer: Any, seed: int = 0, says: Sequence[str] = ()) -> None:
        self.tokenizer, self.says, self.stop_ids = tokenizer, list(says), [END]
        self.config: Any = None
        self.parsers: Any = TextCalls(tokenizer)
        self.asked: list[tuple[list[int], Completion]] = []
        """Every context and what was sampled for it."""
        self.seeds: list[int | None] = []
        self.temperatures: list[float | None] = []
        self.gate: asyncio.Event | None = None
        """Where set, nothing is sampled before."""
        self.lost = False
        self.running = 0

    async def sample(
        self, token_ids: list[int], n: int, seed: int | None, temperature: float | None, max_tokens: int, **more: Any
    ) -> list[Completion]:
        assert n == 1
        self.more = more
        self.seeds.append(seed)
        self.temperatures.append(temperature)
        self.running += 1
        try:
            await (self.gate.wait() if self.gate else asyncio.sleep(0))
        finally:
            self.running -= 1
        if self.lost:
            raise EngineLost("its process has ended")
        draw = random.Random(json.dumps([seed, token_ids]))
        if self.says:
            ids = self.tokenizer.encode(self.says.pop(0), add_special_tokens=False)
        else:
            ids = [draw.randrange(15, 60) for _ in range(draw.randrange(1, 12))]
        ids = [*ids, END]
        cut = len(ids) > max_tokens
        ids = ids[:max_tokens]
        one = Completion(
            token_ids=ids,
            logprobs=[-1.0 - len(self.asked)] * len(ids),
            versions=[7] * len(ids),
            finish_reason="length" if cut else "stop",
        )
        self.asked.append((list(token_ids), one))
        return [one]


class TextCalls:
    """Stands for vLLM's parser: a call is CALL name {arguments}."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def of(self, tools: Sequence[Any], *, calls: bool) -> "TextCalls":
        return self

    def __call__(self, prompt: Sequence[int], done: Completion) -> Parsed:
        text = self.tokenizer.decode(done.token_ids, skip_special_tokens=True)
        calls = tuple(Call(name=n, arguments=json.loads(a)) for n, a in CALL.findall(text))
        return Parsed(text=CALL.sub("", text), calls=calls if done.finish_reason == "stop" else ())


def settings(**rollout: Any) -> Config:
    async def agent(ctx: Any) -> float:
        return 0.0

    given = {"max_tokens": 32, "max_model_len": 2048} | rollout
    return Config(name="t", model="tiny", data=Data(train=[]), agent=agent, rollout=RolloutConfig(**given))


def endpoint(folder: Path, *, says: Sequence[str] = (), seed: int = 0, **rollout: Any) -> tuple[Endpoint, Engine]:
    """An endpoint that has not started, and its engine."""
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(folder, eos="<end>", chat_template=TEMPLATE))
    engine = Engine(tokenizer, seed, says)
    engine.config = settings(**rollout)
    return Endpoint(engine, Rendering()), engine


def public(folder: Path, *, says: Sequence[str] = (), **rollout: Any) -> tuple[PublicEndpoint, Engine]:
    """The server of a model for anybody, which has not started, and its engine."""
    _, engine = endpoint(folder, says=says, **rollout)
    return PublicEndpoint(engine, Rendering()), engine


def opening(secret: str = "s" * 24, *, turns: int = 1000, tokens: int | None = None, member: int = 0) -> Opening:
    return Opening(secret=secret, seed=(0, 5, member), turns=turns, tokens=tokens)
