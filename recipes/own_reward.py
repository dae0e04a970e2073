"""A task of your own: data from a Python function, and a reward with named parts.

    python recipes/own_reward.py

The model reads two numbers and must answer with the larger one. It runs on a laptop, with the quickstart's model. Copy
this file and change `comparisons` and `reward`. docs/tutorials/your-task.md explains each line.
"""

import random
import re

from rl.config import Config, RolloutConfig, TrainerConfig
from rl.objectives import GSPO
from rl.types import Data, Example, Reply
from trainer.launch import launch


def example(a: int, b: int) -> Example:
    """One question. `task` holds what the reward needs; the model sees the prompt only."""
    question = f"Which number is larger, {a} or {b}? Answer with the number alone."
    return Example(prompt=[{"role": "user", "content": question}], task={"answer": str(max(a, b))})


def comparisons() -> Data:
    """300 training questions and 32 others for the evaluation, always the same ones."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if a != b]
    chosen = [example(a, b) for a, b in random.Random(0).sample(pairs, 332)]
    return Data(train=chosen[32:], evals={"held_out": chosen[:32]})


def is_right(reply: Reply) -> float:
    """1 if the reply ended by itself and its last integer is the answer, else 0."""
    numbers = re.findall(r"\d+", reply.text)
    return float(reply.finished and bool(numbers) and numbers[-1] == reply.task["answer"])


def reward(reply: Reply) -> dict[str, float]:
    """Two parts. Their sum is the reward, and each is logged as `reward/<part>/mean`."""
    alone = reply.text.strip().isdigit()
    return {"right": is_right(reply), "format": 0.2 * alone}


config = Config(
    name="own_reward",
    model="models/smollm2-135m",
    data=comparisons,
    reward=reward,
    # Evaluations count right answers only: pass@k needs a reward of at least 1.
    eval_reward=is_right,
    objective=GSPO(),
    steps=12,
    eval_samples=3,
    dtype="float32",
    rollout=RolloutConfig(max_tokens=12, max_model_len=128, max_num_seqs=64, kv_cache_gib=0.25),
    trainer=TrainerConfig(lr=3e-5, micro_batch_tokens=512),
)

if __name__ == "__main__":
    launch(config)
