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
# This model follows an example, and no description.
WORKED = [
    "Sum the multiples of 4 from 11 to 52",
    "print(sum(x for x in range(11, 53) if x % 4 == 0))",
    "Output: 352",
    "352",
]


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
    rng, asked = random.Random(0), set()
    while len(asked) < 384:
        low = rng.randrange(2, 50)
        asked.add((rng.choice([2, 3, 5, 6, 7]), low, low + rng.randrange(10, 60)))
    examples = [
        Example(
            prompt=[*worked, {"role": "user", "content": f"Sum the multiples of {k} from {low} to {high}"}],
            task={"answer": str(sum(x for x in range(low, high + 1) if x % k == 0))},
        )
        for k, low, high in sorted(asked)
    ]
    rng.shuffle(examples)
    return Data(train=examples[64:], evals={"held_out": examples[:64]})


config = Config(
    name="python_tool",
    model="models/smollm2-135m",
    data=sums,
    env=PythonTool,
    limits=Limits(turns=3),
    objective=GSPO(),
    steps=10,
    dtype="float32",
    rollout=RolloutConfig(max_tokens=40, max_model_len=320, max_num_seqs=64, kv_cache_gib=0.25),
    trainer=TrainerConfig(lr=3e-5, zero_stage=0, micro_batch_tokens=1024),
)

if __name__ == "__main__":
    launch(config)
