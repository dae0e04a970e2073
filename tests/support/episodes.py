"""A conversation without a model: tokens are characters, the policy is a function, and the environment a calculator."""

import asyncio
import inspect
import random
import re
from collections.abc import Callable
from typing import Any

from rl.environments.host import Host, ThreadHost, close, offered
from rl.environments.play import Stage
from rl.environments.types import EnvLate, Episode, Limits, Messages, ToolError
from rl.types import Call, Completion, Parsed, Prompt


def ids(text: str) -> list[int]:
    return [ord(each) for each in text]


def text(token_ids: list[int], **_: Any) -> str:
    return "".join(map(chr, token_ids))


def written(messages: Messages) -> str:
    """A chat template, with the assistant's turn opened."""
    return "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]"


class Chat:
    """What messages add."""

    tools = ()

    def prompt(self, messages: Messages, more: Any = ()) -> list[int]:
        return ids(written(messages))

    def delta(self, messages: Messages, after: list[int]) -> list[int]:
        return ids(written(messages))


def prompt(content: str = "2*3+4", ordinal: int = 0, **task: Any) -> Prompt:
    given = [{"role": "user", "content": content}]
    return Prompt(ordinal=ordinal, token_ids=ids(written(given)), task=task or {"answer": "10"}, given=given)


Says = Callable[[str, random.Random], str]
"""The policy: what it writes after a text."""


class Engine:
    """`Rollouts` that ask a function, and keep what they were asked."""

    def __init__(self, says: Says, parses: Callable[[str], Parsed] | None = None) -> None:
        self.says, self.parses = says, parses
        self.asked: list[dict[str, Any]] = []
        self.version = 0

    async def sample(
        self,
        token_ids: list[int],
        n: int,
        *,
        seed: int | None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        engine: int | None = None,
        tools: Any = None,
    ) -> list[Completion]:
        await asyncio.sleep(0)
        said = self.says(text(token_ids), random.Random(seed))
        cut = said[:max_tokens]
        completion = Completion(
            token_ids=ids(cut),
            logprobs=[-0.5] * len(cut),
            versions=[self.version] * len(cut),
            finish_reason="stop" if cut == said else "length",
            parsed=self.parses(cut) if self.parses else None,
            engine=3,
        )
        asked = {
            "context": list(token_ids),
            "n": n,
            "seed": seed,
            "max_tokens": max_tokens,
            "engine": engine,
            "tools": tools,
        }
        self.asked.append(asked | {"temperature": temperature, "completion": completion})
        return [completion] * n


class Calculator:
    """Two dependent calls, in a text protocol."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.task = task

    def multiply(self, a: int, b: int) -> int:
        """Multiply two integers."""
        return a * b

    async def add(self, a: int, b: int) -> int:
        """Add two integers."""
        return a + b

    def parse(self, text: str) -> list[Call]:
        names = {"*": "multiply", "+": "add"}
        if text.startswith("CALC") and not re.fullmatch(r"CALC\(\d+[*+]\d+\)", text):
            raise ToolError(f"{text} is no calculation")
        return [
            Call(name=names[sign], arguments={"a": int(a), "b": int(b)})
            for a, sign, b in re.findall(r"CALC\((\d+)([*+])(\d+)\)", text)
        ]

    def reward(self, episode: Episode) -> float:
        return float(episode.text == self.task["answer"])


class InlineHost:
    """Environments on the event loop itself, without threads: for loops whose clock jumps."""

    def __init__(self, env: Any) -> None:
        self.env = env

    async def make(self, task: Any, seconds: float) -> "Inline":
        return Inline(await answered(lambda: self.env(task), seconds))


class Inline:
    def __init__(self, environment: Any) -> None:
        self.environment, self.offers = environment, offered(environment)

    async def run(self, work: Any, seconds: float) -> Any:
        return await answered(lambda: work(self.environment), seconds)

    async def close(self, seconds: float) -> None:
        if "close" in self.offers:
            await self.run(close, seconds)


async def answered(work: Callable[[], Any], seconds: float) -> Any:
    try:
        async with asyncio.timeout(seconds) as clock:
            result = work()
            return await result if inspect.isawaitable(result) else result
    except TimeoutError:
        if clock.expired():
            raise EnvLate(f"took longer than {seconds:g} s") from None
        raise


def solves(before: str, r: random.Random) -> str:
    """A policy that solves a*b+c."""
    a, b, c = re.findall(r"(\d+)\*(\d+)\+(\d+)", before)[-1]
    turns = before.count("[assistant]")
    last = before.split("[user]")[-1].removesuffix("[assistant]")
    return f"CALC({a}*{b})" if turns == 1 else f"CALC({last}+{c})" if turns == 2 else last


def stage(engine: Any, host: Host | None = None, *, env: Any = Calculator, **more: Any) -> Stage:
    defaults: dict[str, Any] = {"limits": Limits(), "max_tokens": 40, "max_model_len": 2000, "reward_s": 10.0}
    defaults["chat"] = Chat()
    return Stage(
        host=host or ThreadHost(env=env),
        rollouts=engine,
        decode=text,
        **defaults | more,
    )
