"""The calculator as an agent of another client, which CLIENT names: the recipe of scripts/docs/agents.py."""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import openai

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

from calculator import config as calculator

from trainer.launch import launch

HERE = "http://127.0.0.1"


def solve(messages: list[dict[str, Any]], c: int) -> Any:
    """The agent's loop: it yields a conversation, and is sent the text of the reply and whether it was cut off."""
    text, cut = "", False
    for _ in range(4):
        text, cut = yield messages
        call = re.search(r"CALC\((\d+)([*+])(\d+)\)", text)
        if cut or not call:
            break
        a, b = int(call[1]), int(call[3])
        told = f"Compute {a * b}+{c}" if call[2] == "*" else f"Answer {a + b}"
        messages = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": told}]
    return "" if cut else text.strip()


def openai_sync(ctx: Any, messages: Any) -> tuple[str, bool]:
    choice = SYNC.with_options(base_url=ctx.base_url).chat.completions.create(model="m", messages=messages).choices[0]
    return choice.message.content or "", choice.finish_reason == "length"


def openai_sync_stream(ctx: Any, messages: Any) -> tuple[str, bool]:
    client = SYNC.with_options(base_url=ctx.base_url)
    chunks = [c.choices[0] for c in client.chat.completions.create(model="m", messages=messages, stream=True)]
    return "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason == "length"


async def openai_async(ctx: Any, messages: Any) -> tuple[str, bool]:
    client = ASYNC.with_options(base_url=ctx.base_url)
    choice = (await client.chat.completions.create(model="m", messages=messages)).choices[0]
    return choice.message.content or "", choice.finish_reason == "length"


async def openai_async_stream(ctx: Any, messages: Any) -> tuple[str, bool]:
    client = ASYNC.with_options(base_url=ctx.base_url)
    stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
    chunks = [c.choices[0] async for c in stream]
    return "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason == "length"


async def openai_responses(ctx: Any, messages: Any) -> tuple[str, bool]:
    reply = await ASYNC.with_options(base_url=ctx.base_url).responses.create(model="m", input=messages)
    return reply.output_text, reply.status == "incomplete"


async def anthropic_async(ctx: Any, messages: Any) -> tuple[str, bool]:
    client = CLAUDE.with_options(base_url=ctx.anthropic_url)
    reply = await client.messages.create(model="m", max_tokens=16, messages=messages)
    return "".join(block.text for block in reply.content if block.type == "text"), reply.stop_reason == "max_tokens"


ASKS = {
    "openai-sync": openai_sync,
    "openai-sync-stream": openai_sync_stream,
    "openai-async": openai_async,
    "openai-async-stream": openai_async_stream,
    "openai-responses": openai_responses,
    "anthropic-async": anthropic_async,
}
SYNC = openai.OpenAI(base_url=HERE, api_key="none")
ASYNC = openai.AsyncOpenAI(base_url=HERE, api_key="none")
CLAUDE = anthropic.AsyncAnthropic(base_url=HERE, api_key="none")
CLIENT = os.environ.get("CLIENT", "openai-async")


def agent_sync(ctx: Any) -> float:
    loop = solve(list(ctx.messages), ctx.task["c"])
    messages = next(loop)
    while True:
        try:
            messages = loop.send(ASKS[CLIENT](ctx, messages))
        except StopIteration as done:
            return float(done.value == ctx.task["answer"])


async def agent_async(ctx: Any) -> float:
    loop = solve(list(ctx.messages), ctx.task["c"])
    messages = next(loop)
    while True:
        said = await ASKS[CLIENT](ctx, messages)
        try:
            messages = loop.send(said)
        except StopIteration as done:
            return float(done.value == ctx.task["answer"])


agent = agent_sync if "-sync" in CLIENT else agent_async
config = replace(calculator, name=f"calculator-{CLIENT}", env=None, agent=agent)

if __name__ == "__main__":
    launch(config)
