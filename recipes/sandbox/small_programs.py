"""Programs in a sandbox: SmolLM2-135M-Instruct writes one line of Python, judged by hidden tests, on a laptop.

python recipes/sandbox/small_programs.py --seed 1
"""

import random

from rl.config import Config, RolloutConfig, TrainerConfig
from rl.objectives import GSPO
from rl.sandbox import Bubblewrap, share_passed
from rl.types import Data, Example, Reply
from trainer.launch import launch

HIDDEN = (3, 10, 47)
"""The numbers that a program reads in its tests. It sees them one at a time, and never the answers."""
# This model follows examples, and no description.
WORKED = ["n*3+7", "print(int(input())*3+7)", "n*5-21", "print(int(input())*5-21)"]


def tasks() -> Data:
    """320 formulas to train on, and 48 others that are held out."""
    Bubblewrap().start()  # a machine without a sandbox ends the run here, with the remedy
    worked = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(WORKED)]
    examples: list[Example] = []
    for number in random.Random(0).sample(range(2 * 39 * 39), 368):
        factor, term, sign = 2 + number % 39, 2 + number // 39 % 39, 1 - 2 * (number // 39**2)
        asked = {"role": "user", "content": f"n*{factor}{sign * term:+}"}
        cases = [(str(n), str(n * factor + sign * term)) for n in HIDDEN]
        examples.append(Example(prompt=[*worked, asked], task={"cases": cases}))
    return Data(train=examples[48:], evals={"held_out": examples[:48]})


def reward(reply: Reply) -> float:
    """The share of hidden tests that the program passes; each runs in a box of its own."""
    return share_passed(Bubblewrap, reply.text, reply.task["cases"]) if reply.finished else 0.0


config = Config(
    name="small_programs",
    model="models/smollm2-135m",
    data=tasks,
    reward=reward,
    objective=GSPO(),
    steps=6,
    eval_samples=4,
    dtype="float32",
    rollout=RolloutConfig(max_tokens=28, max_model_len=192, max_num_seqs=64, kv_cache_gib=0.25),
    trainer=TrainerConfig(lr=3e-5, zero_stage=0, micro_batch_tokens=1024),
)

if __name__ == "__main__":
    launch(config)
