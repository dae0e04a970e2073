"""Episodes: SmolLM2-135M-Instruct works out a*b+c with a calculator, one operation in each turn, on a laptop.

python recipes/calculator.py --seed 1
"""

import random
import re

from rl.config import Config, RolloutConfig, TrainerConfig
from rl.environments.types import Episode, Limits
from rl.objectives import GSPO
from rl.types import Call, Data, Example
from trainer.launch import launch

# This model follows an example, and no description.
WORKED = ["Compute 23*47+15.", "CALC(23*47)", "1081", "CALC(1081+15)", "1096", "1096"]


class Calculator:
    def __init__(self, task):
        self.task = task

    def calc(self, a: int, sign: str, b: int) -> int:
        """Multiply or add two integers."""
        return a * b if sign == "*" else a + b

    def parse(self, text: str) -> list[Call]:
        found = re.findall(r"CALC\((\d+)([*+])(\d+)\)", text)
        return [Call(name="calc", arguments={"a": int(a), "sign": sign, "b": int(b)}) for a, sign, b in found]

    def reward(self, episode: Episode) -> float:
        return float(episode.ended == "done" and episode.text.strip() == self.task["answer"])


def sums() -> Data:
    """480 questions to train on, and 64 others that are held out."""
    r = random.Random(0)
    numbers = [(r.randint(11, 99), r.randint(11, 99), r.randint(11, 99)) for _ in range(544)]
    worked = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(WORKED)]
    examples = [
        Example(prompt=[*worked, {"role": "user", "content": f"Compute {a}*{b}+{c}."}], task={"answer": str(a * b + c)})
        for a, b, c in numbers
    ]
    return Data(train=examples[64:], evals={"held_out": examples[:64]})


config = Config(
    name="calculator",
    model="models/smollm2-135m",
    data=sums,
    env=Calculator,
    limits=Limits(turns=4),
    objective=GSPO(),
    steps=20,
    dtype="float32",
    rollout=RolloutConfig(max_tokens=16, max_model_len=256, max_num_seqs=64, kv_cache_gib=0.25),
    trainer=TrainerConfig(lr=3e-5, zero_stage=0, micro_batch_tokens=512),
)

if __name__ == "__main__":
    launch(config)
