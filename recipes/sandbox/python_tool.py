"""A Python tool between turns: SmolLM2-135M-Instruct writes a program, reads its output, and answers. For a laptop.

python recipes/sandbox/python_tool.py --seed 1
"""

import random

from rl.config import Config, RolloutConfig, TrainerConfig
from rl.environments import Call, Episode, Limits
from rl.objectives import GSPO
from rl.sandbox import Bubblewrap
from rl.types import Data, Example
from trainer.launch import launch

BOX = Bubblewrap()
# This model follows examples, and no description.
WORKED = ["Compute 23*47+15", "print(23*47+15)", "Output: 1096", "1096"]
WORKED += ["Compute 61*18-40", "print(61*18-40)", "Output: 1058", "1058"]


class PythonTool:
    def __init__(self, task):
        self.task = task

    def python(self, code: str) -> str:
        """Run a Python program; returns what it printed, or its error."""
        ran = BOX.run(["python", "main.py"], files={"main.py": code}, timeout=2.0)
        shown = ran.stdout if ran.well else (ran.stderr.strip() or "too slow").splitlines()[-1]
        return f"Output: {shown.strip()[:80]}"

    def parse(self, text: str) -> list[Call]:
        return [Call(name="python", arguments={"code": text})] if "print(" in text else []

    def reward(self, episode: Episode) -> float:
        return float(episode.ended == "done" and episode.text.strip() == self.task["answer"])


def sums() -> Data:
    """320 questions to train on, and 64 others that are held out."""
    BOX.start()  # a machine without a sandbox ends the run here, with the remedy
    worked = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(WORKED)]
    examples: list[Example] = []
    for number in random.Random(0).sample(range(2 * 89**3), 384):
        a, b, c = 11 + number % 89, 11 + number // 89 % 89, 11 + number // 89**2 % 89
        sign = 1 - 2 * (number // 89**3)
        asked = {"role": "user", "content": f"Compute {a}*{b}{sign * c:+}"}
        examples.append(Example(prompt=[*worked, asked], task={"answer": str(a * b + sign * c)}))
    return Data(train=examples[64:], evals={"held_out": examples[:64]})


config = Config(
    name="python_tool",
    model="models/smollm2-135m",
    data=sums,
    env=PythonTool,
    limits=Limits(turns=3),
    objective=GSPO(),
    steps=6,
    dtype="float32",
    rollout=RolloutConfig(max_tokens=24, max_model_len=320, max_num_seqs=64, kv_cache_gib=0.25),
    trainer=TrainerConfig(lr=3e-5, zero_stage=0, micro_batch_tokens=1024),
)

if __name__ == "__main__":
    launch(config)
