"""GSM8K with GSPO: Qwen2.5-1.5B-Instruct learns grade-school word problems, judged by math-verify.

    python recipes/gsm8k/gsm8k_gspo.py

Hardware: 8 GPUs of 80 GB (4 engines, 4 learner ranks), and the hub or its local cache for model and data.
Not yet run on GPUs.
"""

import re
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

from rl.config import Config, RolloutConfig, TrainerConfig
from rl.objectives import GSPO
from rl.objectives.corrections import GeometricMask
from rl.types import Data, Example, Reply
from trainer.launch import launch

INSTRUCTION = "Reason step by step, and put your final answer, a number alone, in \\boxed{}."
GOLD = re.compile(r"####\s*(-?[\d,]+(?:\.\d+)?)\s*$")
BOX = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
# SymPy works out 9^{9^{9^9}} or 99999999! for as long as it takes, and math-verify's own timeouts need the main
# thread. No answer here needs a power or a factorial, so a box with one is a wrong answer.
BOUNDED = re.compile(r"(?:\\[dt]?frac|\\text|\\\W|[^\\^!]){1,60}")


def gold(question: str, solution: str) -> sympy.Rational:
    """The number after `####`, "1,234" included. Raises ValueError that names the question when there is none."""
    found = GOLD.search(solution)
    if not found:
        raise ValueError(f"the solution to {question!r} has no number after '####': it ends {solution[-80:]!r}")
    return sympy.Rational(found[1].replace(",", ""))  # pyright: ignore[reportReturnType]


def gsm8k() -> Data:
    """All 7,473 training problems, and the 1,319 of the test split as held-out set `test`."""
    from datasets import load_dataset

    def examples(split: str) -> list[Example]:
        rows: Any = load_dataset("openai/gsm8k", "main", split=split)
        for row in rows:
            gold(row["question"], row["answer"])  # a bad one must end the run now, not at step 90
        return [
            Example(
                prompt=[{"role": "user", "content": f"{row['question']}\n{INSTRUCTION}"}],
                task={"question": row["question"], "answer": row["answer"]},
            )
            for row in rows
        ]

    return Data(train=examples("train"), evals={"test": examples("test")})


def boxed_answer_is_right(reply: Reply) -> float:
    """1.0 if the reply's last box equals the solution's number, else 0.0, also when it cannot be parsed."""
    right = gold(reply.task["question"], reply.task["answer"])
    boxes = BOX.findall(reply.text)
    if not boxes or not BOUNDED.fullmatch(boxes[-1]):
        return 0.0
    # Rewards are judged in threads, where math-verify's alarms cannot be set: hence no timeouts.
    answer = parse(
        f"\\boxed{{{boxes[-1]}}}", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None
    )
    return float(bool(answer) and verify(right, answer, timeout_seconds=None))


config = Config(
    name="gsm8k_gspo",
    # Without GPUs it ends with what is missing, rather than on CPU processes.
    device="cuda",
    model="Qwen/Qwen2.5-1.5B-Instruct",
    data=gsm8k,
    reward=boxed_answer_is_right,
    objective=GSPO(),
    steps=350,  # three epochs
    prompts_per_step=64,
    group_size=8,
    max_staleness=1,
    # Judges a sequence by its geometric mean, as GSPO's own ratio does; a product over hundreds of tokens would be
    # mostly bf16 noise.
    correction=GeometricMask(low=0.99, high=1.01),
    eval_every=25,
    eval_temperature=0.0,
    rollout=RolloutConfig(engines=4, max_tokens=1024, max_model_len=1536, max_num_seqs=256),
    # Four optimizer steps per batch: with one alone no ratio leaves 1, and GSPO's clipping has nothing to do.
    # ZeRO 1 sums gradients over ranks once per step, ZeRO 2 after every micro-batch.
    trainer=TrainerConfig(ranks=4, zero_stage=1, lr=1e-6, warmup_steps=20, minibatches=4, micro_batch_tokens=8192),
)

if __name__ == "__main__":
    launch(config)
