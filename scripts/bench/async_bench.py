"""What does training while sampling gain, and cost? Synchronous against asynchronous runs at heavy-tailed lengths.

    python scripts/bench/async_bench.py --steps 30 --turns 3 --out docs/async.json     # about 15 minutes on two cores

A small model learns to echo a digit, in whole runs. Reply lengths are lognormal; their 99th percentile is ten times
their median. A synchronous step therefore waits for its longest reply while the engine is nearly empty. Synchronous
runs may use both cores in each phase (two threads each). Asynchronous runs share the cores (one thread each), and
weight their stale samples by token TIS. All runs see the same number of samples. The final policy of each is evaluated
afterwards, with new samples.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rl.config import Config, Deadlines, RolloutConfig, TrackingConfig, TrainerConfig
from rl.objectives import GRPO
from rl.objectives.corrections import TokenTIS, Uncorrected
from rl.types import Data, Reply

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts")]
MODES = {
    "synchronous": {"max_staleness": 0, "threads": 2},
    "one step off": {"max_staleness": 1, "threads": 1},
    "asynchronous": {"max_staleness": 2, "threads": 1},
}
EVAL_SAMPLES = 8
"""Of each of the ten prompts, from the final policy."""


def share_of_echoes(reply: Reply) -> float:
    """Share of the reply that is the digit."""
    return reply.text.count(reply.task["digit"]) / max(1, len(reply.token_ids))


def digits_twice() -> Data:
    """The same prompts for training and evaluation: the question is whether the model learns at all."""
    from echo_task import digits

    train = digits().train
    return Data(train=train, evals={"digits": train})


def config(mode: str, model: str, folder: str, steps: int, seed: int) -> Config:
    threads = MODES[mode]["threads"]
    return Config(
        name=f"{mode.replace(' ', '-')}-{seed}",
        model=model,
        data=digits_twice,
        eval_samples=EVAL_SAMPLES,
        reward=share_of_echoes,
        objective=GRPO(),
        correction=TokenTIS() if MODES[mode]["max_staleness"] else Uncorrected(),
        dtype="float32",
        device="cpu",
        doctor="off",
        steps=steps,
        seed=seed,
        prompts_per_step=8,
        group_size=8,
        max_staleness=MODES[mode]["max_staleness"],
        trainer=TrainerConfig(lr=3e-4, threads=threads),
        rollout=RolloutConfig(
            max_tokens=400,
            max_model_len=416,
            max_num_seqs=32,
            kv_cache_gib=0.5,
            threads=threads,
            engine_class="heavy_tailed:HeavyTailed",
        ),
        deadlines=Deadlines(start_s=200),
        tracking=TrackingConfig(wandb="off"),
        output_dir=folder,
        save_every=0,
        save_final=False,
    )


def measured(mode: str, model: str, folder: str, steps: int, seed: int) -> dict[str, float]:
    """Figures of one run, without its first step, which includes warm-up."""
    from trainer.run import run

    one = config(mode, model, folder, steps, seed)
    run(one)
    rows = [json.loads(line) for line in Path(folder, one.name, "metrics.jsonl").read_text().splitlines()]
    reward = rows[-1][f"eval/digits/avg@{EVAL_SAMPLES}"]
    rows = [row for row in rows if "reward/mean" in row][1:]
    seconds = sum(row["timing_s/step"] for row in rows)
    tokens = sum(row["perf/tokens_per_s"] * row["timing_s/step"] for row in rows)
    weighted = {
        name: sum(row[f"perf/{name}"] * row["timing_s/step"] for row in rows) / seconds
        for name in ("trainer_idle_frac", "rollout_idle_frac")
    }
    return weighted | {
        "tokens_per_s": tokens / seconds,
        "tokens": tokens,
        "seconds": seconds,
        "reward": reward,
        "ess": statistics.mean(row.get("rollout_corr/ess", 1.0) for row in rows),
        "staleness": statistics.mean(row["staleness/mean"] for row in rows),
        "dropped": rows[-1]["staleness/dropped_frac"],
    }


def table(runs: dict[str, list[dict[str, float]]]) -> str:
    lines = [
        "| mode | trained tokens/s | against synchronous | trainer idle | engine idle | staleness | ESS | dropped | "
        "final reward |"
    ]
    lines.append("|---" * 9 + "|")
    base = runs["synchronous"]
    for mode, rows in runs.items():
        mean = {name: statistics.mean(row[name] for row in rows) for name in rows[0]}
        ratios = [row["tokens_per_s"] / b["tokens_per_s"] for row, b in zip(rows, base, strict=True)]
        spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
        reward = f"{mean['reward']:.3f}"
        if len(rows) > 1:
            reward += f" ± {statistics.stdev(row['reward'] for row in rows) / len(rows) ** 0.5:.3f}"
        lines.append(
            f"| {mode} | {mean['tokens_per_s']:.0f} | {statistics.mean(ratios):.2f}x{spread} | "
            f"{mean['trainer_idle_frac']:.0%} | {mean['rollout_idle_frac']:.0%} | {mean['staleness']:.2f} | "
            f"{mean['ess']:.2f} | {mean['dropped']:.1%} | {reward} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each run (default: 30)")
    parser.add_argument("--turns", type=int, default=3, help="runs of each mode, in alternation (default: 3)")
    parser.add_argument("--out", help="a JSON file for the figures")
    args = parser.parse_args()
    from echo_task import make_model

    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", hidden=256, inner=768, layers=4)
        for seed in range(args.turns):
            for mode in MODES:
                runs[mode].append(measured(mode, model, folder, args.steps, seed))
    print(table(runs))
    if args.out:
        Path(args.out).write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
