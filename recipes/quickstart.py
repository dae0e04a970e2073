"""Quickstart: SmolLM2-135M-Instruct learns one-digit products on a laptop, with the real engine and trainer.

python recipes/quickstart.py --seed 1
"""

import hashlib
import re

from rl.config import Config, RolloutConfig, TrainerConfig
from rl.objectives import GSPO
from rl.types import Data, Example, Reply
from trainer.launch import launch

HELD_OUT = 32


def products() -> Data:
    """All 100 products of one-digit numbers, worded as in reasoning-gym. A fixed third, by hash, is not trained on."""
    ask = "Solve the following multiplication: {} * {}. Give only the result as your final answer."
    questions = {ask.format(a, b): str(a * b) for a in range(10) for b in range(10)}
    ordered = sorted(questions, key=lambda q: hashlib.sha256(q.encode()).digest())
    examples = [
        Example(prompt=[{"role": "user", "content": q}], task={"question": q, "answer": questions[q]}) for q in ordered
    ]
    return Data(train=examples[HELD_OUT:], evals={"held_out": examples[:HELD_OUT]})


def last_integer_is_right(reply: Reply) -> float:
    """1 if the reply ended by itself and its last integer is the answer, else 0."""
    numbers = re.findall(r"-?\d+", reply.text)
    return float(reply.finished and bool(numbers) and numbers[-1] == reply.task["answer"])


config = Config(
    name="quickstart",
    model="models/smollm2-135m",
    data=products,
    reward=last_integer_is_right,
    objective=GSPO(),
    steps=12,
    prompts_per_step=8,
    group_size=8,
    eval_every=6,
    eval_samples=3,
    # Few laptops have bf16 units; in fp32 the engine and the trainer agree to six digits.
    dtype="float32",
    # 3,700 tokens of this model; the 96 samples of an evaluation need 3,100, for samples of a prompt share its blocks.
    rollout=RolloutConfig(max_tokens=12, max_model_len=128, max_num_seqs=96, kv_cache_gib=0.16),
    # One rank has nothing to shard: ZeRO 0 needs no second copy of weights and gradients, 1 GiB here.
    trainer=TrainerConfig(lr=3e-5, zero_stage=0),
)

if __name__ == "__main__":
    launch(config)
