"""An agent as it is: the calculator's task in a loop of its own, written with the stock client of OpenAI.

python recipes/calculator_agent.py --seed 1

`agent` could be any program that talks to an OpenAI-compatible server: it imports nothing of this framework.
"""

import re
from dataclasses import replace

from calculator import config as calculator
from openai import AsyncOpenAI

from trainer.launch import launch

client = AsyncOpenAI(base_url="http://127.0.0.1", api_key="none")
"""Shared by all episodes, with its connections; each has an address of its own."""


async def agent(ctx) -> float:
    here, messages, text, cut = client.with_options(base_url=ctx.base_url), list(ctx.messages), "", False
    for _ in range(4):
        reply = (await here.chat.completions.create(model=ctx.model, messages=messages)).choices[0]
        text, cut = reply.message.content or "", reply.finish_reason == "length"
        call = re.search(r"CALC\((\d+)([*+])(\d+)\)", text)
        if cut or not call:
            break
        a, b = int(call[1]), int(call[3])
        told = f"Compute {a * b}+{ctx.task['c']}" if call[2] == "*" else f"Answer {a + b}"
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": told}]
    return float(not cut and text.strip() == ctx.task["answer"])


config = replace(calculator, name="calculator_agent", env=None, agent=agent)

if __name__ == "__main__":
    launch(config)
