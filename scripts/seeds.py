"""Run the quickstart once for each seed, and print the table that README shows.

python scripts/seeds.py 0 1 2          # about 6 minutes a seed on two CPU cores
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "runs" / "seeds"


def main(seeds: list[str]) -> None:
    """Run what has no summary yet, then print one row per seed."""
    print("| seed | held-out before | held-out after | train seconds | worst gap (nats) | tokens |")
    print("|---|---|---|---|---|---|", flush=True)
    for seed in seeds:
        summary = OUT / f"seed{seed}" / "summary.json"
        if not summary.exists():
            flags = ["--seed", seed, "--name", f"seed{seed}", "--output-dir", str(OUT)]
            with (OUT.parent / f"seed{seed}.log").open("w") as log:
                command = [sys.executable, "-W", "ignore", "recipes/quickstart.py", *flags]
                subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)
        s = json.loads(summary.read_text())

        def accuracy(when: str, s: dict = s) -> str:
            mean, error = (s[when][f"eval/held_out/avg@3{suffix}"] for suffix in ("", "_se"))
            return f"{mean:.3f} ± {error:.3f}"

        print(
            f"| {seed} | {accuracy('eval_before')} | {accuracy('eval_after')} | {s['train_seconds']:.0f} | "
            f"{s['worst_logprob_gap']:.1e} | {s['tokens']} |",
            flush=True,
        )


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    main(sys.argv[1:] or ["0", "1", "2"])
