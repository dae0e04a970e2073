"""Episodes: SmolLM2-135M-Instruct works out a*b+c with a calculator, one operation in each turn, on a laptop.

python recipes/calculator.py --seed 1
"""

import random
import re

from rl.config import Config, RolloutConfig, TrainerConfig
from rl.environments import Call, Episode, Limits
from rl.objectives import GSPO
from rl.types import Data, Example
from trainer.launch import launch

# This model follows an example, and no description.
WORKED = ["Compute 23*47+15", "CALC(23*47)", "Compute 1081+15", "CALC(1081+15)", "Answer 1096", "1096"]


class Calculator:
    def __init__(self, task):
        self.task = task

    def calc(self, a: int, sign: str, b: int) -> str:
        """Multiply or add two integers; returns what is left to do."""
        return f"Compute {a * b}+{self.task['c']}" if sign == "*" else f"Answer {a + b}"

    def parse(self, text: str) -> list[Call]:
        found = re.findall(r"CALC\((\d+)([*+])(\d+)\)", text)
        return [Call(name="calc", arguments={"a": int(a), "sign": sign, "b": int(b)}) for a, sign, b in found]

    def reward(self, episode: Episode) -> float:
        return float(episode.ended == "done" and episode.text.strip() == self.task["answer"])


def sums() -> Data:
    """480 questions to train on, and 64 others that are held out."""
    worked = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(WORKED)]
    examples: list[Example] = []
    for number in random.Random(0).sample(range(89**3), 544):
        a, b, c = 11 + number % 89, 11 + number // 89 % 89, 11 + number // 89**2
        asked = {"role": "user", "content": f"Compute {a}*{b}+{c}"}
        examples.append(Example(prompt=[*worked, asked], task={"c": c, "answer": str(a * b + c)}))
    return Data(train=examples[64:], evals={"held_out": examples[:64]})


config = Config(
    name="calculator",
    model="models/smollm2-135m",
    data=sums,
    env=Calculator,
    limits=Limits(turns=4),
    objective=GSPO(),
    steps=6,
    prompts_per_step=6,
    dtype="float32",
    rollout=RolloutConfig(max_tokens=16, max_model_len=256, max_num_seqs=64, kv_cache_gib=0.25),
    trainer=TrainerConfig(lr=3e-5, zero_stage=0, micro_batch_tokens=1024),
)

if __name__ == "__main__":
    launch(config)
