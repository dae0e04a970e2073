"""What does a learner's step cost above bare PyTorch? The same packed rows, in turns.

    python scripts/bench/learner.py --turns 5 --out docs/data/learner.json

*learner* is a rank of a run: DeepSpeed, metrics, the record. *bare* is a plain loop: the same packed rows and head,
`backward`, `clip_grad_norm_` and fused AdamW. Both hold SmolLM2-135M in fp32 in one process, and every row has an
advantage, so none is left out. CPU only."""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rl.batch import collate, take
from rl.config import Config, RolloutConfig, TrainerConfig
from rl.objectives import GRPO
from rl.types import Batch, Data, Trajectory
from trainer import machine
from trainer.cluster.process_env import learner_env
from trainer.learner.learner import Learner
from trainer.learner.passes import own_micro_batches
from trainer.model.policy import load

ROOT = Path(__file__).resolve().parents[2]
PROMPTS, GROUP, PROMPT = 4, 8, 40
LENGTHS = {"quickstart's lengths": 9, "longer replies": 64}
"""Sampled tokens of every reply."""
CONFIG = Config(
    name="learner",
    model=str(ROOT / "models" / "smollm2-135m"),
    data=lambda: Data(train=[]),
    reward=lambda reply: 0.0,
    objective=GRPO(),
    dtype="float32",
    device="cpu",
    old_logprobs="rollout",
    steps=1000,
    prompts_per_step=PROMPTS,
    group_size=GROUP,
    rollout=RolloutConfig(max_tokens=64, max_model_len=128),
    trainer=TrainerConfig(lr=1e-6, zero_stage=0),  # as the recipes for a CPU
)


def batch_of(tokens: int) -> Batch:
    """A step's batch; the rewards of a group are 0 to 7."""
    drawn = torch.Generator().manual_seed(0)
    rows = []
    for group in range(PROMPTS):
        prompt = torch.randint(1, 40000, (PROMPT,), generator=drawn)
        for i in range(GROUP):
            reply = torch.randint(1, 40000, (tokens,), generator=drawn)
            rows.append(
                Trajectory(
                    group=group,
                    episode=i,
                    token_ids=[*prompt.tolist(), *reply.tolist()],
                    mask=[False] * PROMPT + [True] * tokens,
                    logprobs=[0.0] * PROMPT + [-11.0] * tokens,
                    versions=[-1] * PROMPT + [0] * tokens,
                    reward=float(i),
                )
            )
    return collate(rows)


def bare(learner: Learner) -> Callable[[Batch], None]:
    """A step of the plain loop, with the learner's micro-batches."""
    policy = load(CONFIG.model, dtype="float32", fp32_head=True, share_prompts=True)
    adam = torch.optim.AdamW(policy.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    advantages = torch.linspace(-1, 1, GROUP).repeat(PROMPTS)

    def step(batch: Batch) -> None:
        rows = torch.arange(len(batch.rewards))
        for micro in own_micro_batches(learner.parts, batch, rows):
            part = take(batch, micro)
            said = policy(part.input_ids, part.mask, 1.0)
            (-(said.logprobs * advantages[micro, None]).sum() / int(batch.mask.sum())).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=False)  # memory that is there already, as in the learner

    return step


def main() -> None:
    """Take steps in turns, and print the medians and each pair's ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="steps of each side, after one that is not counted")
    parser.add_argument("--out", type=Path, help="JSON file for every step")
    asked = parser.parse_args()
    threads = machine.cores()
    os.environ |= learner_env(threads, "cpu")
    learner = Learner(CONFIG, rank=0, device="cpu", address="127.0.0.1", port=0, model=CONFIG.model, threads=threads)
    sides: dict[str, Callable[[Batch], object]] = {"learner": learner.step, "bare": bare(learner)}
    rows = []
    print("| replies | learner, s | bare, s | bare / learner (smallest to largest) | CPU s, bare / learner |")
    print("|---|---|---|---|---|")
    for name, tokens in LENGTHS.items():
        batch = batch_of(tokens)
        for turn in range(asked.turns + 1):
            pair: dict[str, dict[str, float]] = {}
            for side in list(sides)[:: 1 if turn % 2 else -1]:
                began, cpu = time.perf_counter(), time.process_time()
                sides[side](batch)
                pair[side] = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
            rows += [{"replies": name, "turn": turn} | pair] * (turn > 0)
        here = [row for row in rows if row["replies"] == name]
        ratios = [row["bare"]["seconds"] / row["learner"]["seconds"] for row in here]
        cpu = statistics.median(row["bare"]["cpu"] / row["learner"]["cpu"] for row in here)
        cells = [name, *(f"{statistics.median(row[side]['seconds'] for row in here):.2f}" for side in sides)]
        cells += [f"{statistics.median(ratios):.0%} ({min(ratios):.0%} to {max(ratios):.0%})", f"{cpu:.0%}"]
        print("| " + " | ".join(cells) + " |", flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
