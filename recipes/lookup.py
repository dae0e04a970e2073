"""Episodes: SmolLM2-135M-Instruct finds the colour of an order with two look-ups. The second looks up what the first
returned. For a laptop.

python recipes/lookup.py --seed 1
"""

import random
import re

from rl.config import Config, RolloutConfig, TrainerConfig
from rl.environments import Call, Episode, Limits, ToolError
from rl.objectives import GSPO
from rl.types import Data, Example
from trainer.launch import launch

ORDERS, SHELVES, COLOURS = range(10, 100), range(100, 1000), ["red", "blue", "green", "black", "white", "yellow"]
SHELF_OF = dict(zip(ORDERS, random.Random(0).sample(SHELVES, len(ORDERS)), strict=True))
COLOUR_OF = {shelf: random.Random(shelf).choice(COLOURS) for shelf in SHELF_OF.values()}
"""The table: each order lies on a shelf, and each shelf has a colour."""
# This model follows examples, not descriptions. No number of these examples is in the table.
WORKED = ["Find 1", "FIND(1)", "Find 2071", "FIND(2071)", "Answer red", "red"]
WORKED += ["Find 4", "FIND(4)", "Find 3906", "FIND(3906)", "Answer green", "green"]


class Lookup:
    """For a model with native tool calls."""

    def __init__(self, task):
        self.task = task

    def find(self, number: int) -> str:
        """Look a number up: that of an order or of a shelf. Returns what is left to do."""
        if number in SHELF_OF:
            return f"Find {SHELF_OF[number]}"
        if number not in COLOUR_OF:
            raise ToolError(f"There is no {number}")
        return f"Answer {COLOUR_OF[number]}"

    def reward(self, episode: Episode) -> float:
        return float(episode.ended == "done" and episode.text.strip(" .\n").lower() == self.task["answer"])


class InText(Lookup):
    """For a model that writes its calls as text."""

    def parse(self, text: str) -> list[Call]:
        return [Call(name="find", arguments={"number": int(found)}) for found in re.findall(r"FIND\((\d{1,9})\)", text)]


def questions(worked: list[str] = WORKED, asked: str = "Find {}") -> Data:
    """58 orders to train on, and 32 others that are held out."""
    before = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(worked)]
    examples = [
        Example(
            prompt=[*before, {"role": "user", "content": asked.format(order)}],
            task={"order": order, "answer": COLOUR_OF[SHELF_OF[order]]},
        )
        for order in random.Random(0).sample(ORDERS, len(ORDERS))
    ]
    return Data(train=examples[32:], evals={"held_out": examples[:32]})


config = Config(
    name="lookup",
    model="models/smollm2-135m",
    data=questions,
    env=InText,
    limits=Limits(turns=4),
    objective=GSPO(),
    steps=8,
    eval_samples=4,
    dtype="float32",
    rollout=RolloutConfig(max_tokens=16, max_model_len=256, max_num_seqs=64, kv_cache_gib=0.25),
    trainer=TrainerConfig(lr=3e-5, zero_stage=0, micro_batch_tokens=512),
)

if __name__ == "__main__":
    launch(config)
