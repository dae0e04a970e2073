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

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "runs" / "seeds"


def main(recipe: str, seeds: list[int]) -> None:
    """Run the seeds that have no summary yet, and print one row per seed."""
    print("| recipe | seed | held-out before | held-out after | train seconds | worst gap (nats) | tokens |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for seed in seeds:
        name = f"{recipe}-seed{seed}"
        summary = OUT / name / "summary.json"
        if not summary.exists():
            flags = ["--seed", str(seed), "--name", name, "--output-dir", str(OUT)]
            with (OUT / f"{name}.log").open("w") as log:
                command = [sys.executable, "-W", "ignore", f"recipes/{recipe}.py", *flags]
                subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)
        s = json.loads(summary.read_text())

        def accuracy(when: str, s: dict = s) -> str:
            mean, error = (s[when][f"eval/held_out/avg@3{suffix}"] for suffix in ("", "_se"))
            return f"{mean:.3f} ± {error:.3f}"

        cells = [recipe, str(seed), accuracy("eval_before"), accuracy("eval_after"), f"{s['train_seconds']:.0f}"]
        print("| " + " | ".join([*cells, f"{s['worst_logprob_gap']:.1e}", str(s["tokens"])]) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart", help="a file name in recipes/ (default: quickstart)")
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2], help="default: 0 1 2")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    main(arguments.recipe, arguments.seeds)
