"""Run a recipe once per seed, and print the table of the README.

    python scripts/bench/seeds.py 0 1 2                          # the quickstart; about 6 minutes a seed on two cores
    python scripts/bench/seeds.py --recipe quickstart_grpo 0     # the same run with GRPO

A seed whose run has a summary in runs/seeds/ already is not run again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "runs" / "seeds"


def finished(recipe: str, seed: int, flags: list[str]) -> Path:
    """The folder of a recipe's run with this seed, which is run if it has no summary yet."""
    name = f"{recipe}-seed{seed}"
    if not (OUT / name / "summary.json").exists():
        OUT.mkdir(parents=True, exist_ok=True)
        with (OUT / f"{name}.log").open("w") as log:
            own = ["--seed", str(seed), "--name", name, "--output-dir", str(OUT)]
            command = [sys.executable, "-W", "ignore", f"recipes/{recipe}.py", *own, *flags]
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)
    return OUT / name


def held_out(evaluation: dict[str, float], figure: str = "avg") -> str:
    """A figure of the set "held_out" with its standard error; avg@n for whatever n."""
    (name,) = (n for n in evaluation if n.startswith(f"eval/held_out/{figure}@") and not n.endswith("_se"))
    return f"{evaluation[name]:.3f} ± {evaluation[f'{name}_se']:.3f}"


def main(recipe: str, seeds: list[int]) -> None:
    """Run the seeds that have no summary yet, and print one row per seed."""
    print("| recipe | seed | held-out before | held-out after | train seconds | worst gap (nats) | tokens |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for seed in seeds:
        s: dict[str, Any] = json.loads((finished(recipe, seed, []) / "summary.json").read_text())
        cells = [recipe, str(seed), held_out(s["eval_before"]), held_out(s["eval_after"]), f"{s['train_seconds']:.0f}"]
        print("| " + " | ".join([*cells, f"{s['worst_logprob_gap']:.1e}", str(s["tokens"])]) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart", help="a file name in recipes/ (default: quickstart)")
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2], help="default: 0 1 2")
    arguments = parser.parse_args()
    main(arguments.recipe, arguments.seeds)
