"""Do the objectives learn, and how fast? Task, model, samples per step and seeds are the same for each.

    python scripts/bench/objectives.py --seeds 3 --steps 40 --out docs/data/objectives  # 10 s a run on an idle core

A small model learns to echo a digit eight times, with the framework's learner and two optimizer steps per batch: so
ratios differ from 1, and clipping has an effect. The sampler is plain PyTorch in fp32 (as in
scripts/bench/staleness.py). Writes OUT.json and OUT.png. Objectives that average differently need different learning
rates, but all have the same one here. So the result shows that each objective learns, not which is best.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rl.batch import collate
from rl.config import Config, RolloutConfig, TrainerConfig
from rl.objectives import FAMILY, GSPO, PPO, Objective
from rl.types import Data

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts")]
REPLY = 8
SETTINGS: dict[str, Objective] = {each.__name__: each() for each in FAMILY} | {
    # The paper's range of 3e-4 is for small learning rates and long replies; one step changes more here.
    "GSPO": GSPO(clip_low=0.03, clip_high=0.04),
    "PPO": PPO(lam=1.0, critic_warmup=4),
}


def learn(name: str, seed: int, steps: int, lr: float, folder: str) -> dict[str, Any]:
    """One run: mean reward of every step, the last step's metrics, and seconds."""
    from echo_task import make_model
    from staleness import sample
    from transformers import AutoModelForCausalLM

    import trainer.learner.learner
    from trainer.learner.learner import Learner

    objective, began = SETTINGS[name], time.perf_counter()
    torch.manual_seed(seed)
    model = make_model(Path(folder) / "model", hidden=128, inner=256, layers=2)
    config = Config(
        name="objectives",
        model=model,
        data=lambda: Data(train=[]),
        reward=lambda reply: 0.0,
        objective=objective,
        old_logprobs="recompute",
        dtype="float32",
        seed=seed,
        rollout=RolloutConfig(max_tokens=REPLY),
        trainer=TrainerConfig(
            lr=lr, value_lr=10 * lr if objective.uses_values else None, minibatches=2, micro_batch_tokens=4096
        ),
    )
    if torch.distributed.is_initialized():
        # The learners of one process, in sequence, share one process group.
        trainer.learner.learner.join_group = lambda *_: None
    learner = Learner(config, rank=0, device="cpu", address="127.0.0.1", port=0, model=model)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    targets = dict(plain.named_parameters())
    generator, rewards, metrics = torch.Generator().manual_seed(1000 + seed), [], {}
    for _ in range(steps):
        for weight, tensor in learner.weights:
            targets[weight].data.copy_(tensor)
        rows = sample(plain, generator)
        rewards.append(statistics.mean(t.reward for t in rows))
        metrics = learner.step(collate(rows))
    return {"rewards": rewards, "last_metrics": metrics, "seconds": time.perf_counter() - began}


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Mean reward of the first and of the last quarter of the steps, mean and range over seeds."""
    lines = ["| objective | first quarter | last quarter | range over seeds |", "|---|---|---|---|"]
    for name, runs in found.items():
        quarter = max(len(runs[0]["rewards"]) // 4, 1)
        first = statistics.mean(statistics.mean(r["rewards"][:quarter]) for r in runs)
        last = [statistics.mean(r["rewards"][-quarter:]) for r in runs]
        lines.append(f"| {name} | {first:.3f} | {statistics.mean(last):.3f} | {min(last):.3f} to {max(last):.3f} |")
    return "\n".join(lines)


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Mean reward by step: one line per objective, averaged over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    styles = ("-", "--", ":")
    for i, (name, runs) in enumerate(found.items()):
        mean = [statistics.mean(step) for step in zip(*(r["rewards"] for r in runs), strict=True)]
        axis.plot(range(1, len(mean) + 1), mean, label=name, linestyle=styles[i // 10 % 3])
    axis.set_xlabel("step")
    axis.set_ylabel("mean reward")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs per objective (default: 3)")
    parser.add_argument("--steps", type=int, default=40, help="batches of a run (default: 40)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 1e-3)")
    parser.add_argument("--objectives", default=",".join(SETTINGS), help="names, separated by commas (default: all)")
    parser.add_argument("--out", help="write OUT.json and OUT.png")
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    names = args.objectives.split(",")
    unknown = sorted(set(names) - set(SETTINGS))
    if unknown:
        sys.exit(f"unknown objective {unknown}; choose from {', '.join(SETTINGS)}")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for name in names:
                run = learn(name, seed, args.steps, args.lr, folder)
                found[name].append(run)
                print(f"seed {seed}, {name}: {run['rewards'][-1]:.3f} after {run['seconds']:.0f} s", flush=True)
    print(table(found))
    if args.out:
        values = {"lr": args.lr, "steps": args.steps, "seeds": args.seeds, "runs": found}
        Path(f"{args.out}.json").write_text(json.dumps(values, indent=1) + "\n")
        plot(found, Path(f"{args.out}.png"))


if __name__ == "__main__":
    main()
