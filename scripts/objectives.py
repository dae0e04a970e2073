"""Do the objectives learn, and at what pace? The same task, model, samples per step and seeds for each of them.

python scripts/objectives.py [--seeds 3] [--steps 40] [--objectives GRPO,PPO,...] [--out docs/objectives]

A small model learns to echo a digit eight times, with the framework's own learner and two optimizer steps per batch, so
that ratios leave 1 and clips have something to do. The sampler is plain PyTorch in fp32 (as in scripts/staleness.py).
Writes OUT.json and OUT.png. A run takes some 10 seconds on an idle core. Objectives that average over other things want
other learning rates, and all have the same one here: this shows that each learns, not which is best.
"""

import argparse
import json
import os
import socket
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

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts")]
REPLY = 8
SETTINGS: dict[str, Objective] = {each.__name__: each() for each in FAMILY} | {
    # The paper's range of 3e-4 is for small learning rates and long replies; one step here moves further.
    "GSPO": GSPO(clip_low=0.03, clip_high=0.04),
    "PPO": PPO(lam=1.0, critic_warmup=4),
}


def learn(name: str, seed: int, steps: int, lr: float, folder: str) -> dict[str, Any]:
    """One run: mean reward of every step, and the last step's metrics."""
    from gpu_check import make_model
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
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    if torch.distributed.is_initialized():
        # The learners of one process, one after the other, share its group.
        trainer.learner.learner.join_group = lambda *_: None
    learner = Learner(config, rank=0, device="cpu", address="127.0.0.1", port=port, model=model)
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
    """Mean reward by step, one line for each objective, its seeds averaged."""
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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--objectives", default=",".join(SETTINGS), help="names, separated by commas")
    parser.add_argument("--out", help="OUT.json and OUT.png are written")
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    names = args.objectives.split(",")
    unknown = sorted(set(names) - set(SETTINGS))
    if unknown:
        sys.exit(f"there is no objective {unknown}; there are {', '.join(SETTINGS)}")
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
