"""The echo recipe as an agent with a loop of its own; its evaluation has an environment, which asks the same."""

from dataclasses import replace

import openai
from two_turns import TwoTurns
from two_turns import config as two_turns

from rl.types import Data, Eval
from trainer.launch import launch

client = openai.AsyncOpenAI(base_url="http://127.0.0.1", api_key="none")


async def agent(ctx) -> float:
    here, messages, said = client.with_options(base_url=ctx.base_url), list(ctx.messages), ""
    for turn in range(2):
        reply = (await here.chat.completions.create(model=ctx.model, messages=messages)).choices[0]
        said += reply.message.content
        if reply.finish_reason == "length" or turn:
            break
        told = {"role": "user", "content": f"{ctx.task['digit']}+"}
        messages += [{"role": "assistant", "content": reply.message.content}, told]
    return sum(letter.islower() for letter in said) / max(len(said), 1)


def digits() -> Data:
    """Six digits, and two of them to evaluate on."""
    data = two_turns.data()
    return replace(data, evals={"asked": Eval(examples=list(data.train[:2]), env=TwoTurns)})


config = replace(two_turns, data=digits, env=None, agent=agent)

if __name__ == "__main__":
    launch(config)
