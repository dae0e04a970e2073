"""Train the calculator as an agent of stock clients, and print what each learns next to the environment's class.

    python scripts/docs/agents.py                                  # every client, seeds 0 and 1: an hour on two cores
    python scripts/docs/agents.py --clients openai-async --seeds 0

A run that has a summary in runs/agents/ already is not run again. All figures: docs/data/agents.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUT, DATA = ROOT / "runs" / "agents", ROOT / "docs" / "data" / "agents.json"
CLIENTS = ["openai-sync", "openai-sync-stream", "openai-async", "openai-async-stream", "openai-responses"]
CLIENTS += ["anthropic-async", "environment"]


def finished(client: str, seed: int) -> dict[str, Any]:
    """The summary of one run, which is made if it is not there."""
    name = f"{client}-seed{seed}"
    if not (OUT / name / "summary.json").exists():
        OUT.mkdir(parents=True, exist_ok=True)
        recipe = "recipes/calculator.py" if client == "environment" else "scripts/docs/calculator_clients.py"
        flags = ["--seed", str(seed), "--name", name, "--output-dir", str(OUT), "--no-save-final"]
        with (OUT / f"{name}.log").open("w") as log:
            command = [sys.executable, "-W", "ignore", recipe, *flags]
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True, env=os.environ | {"CLIENT": client})
    return json.loads((OUT / name / "summary.json").read_text())


def main() -> None:
    """Make the runs that are missing, and print one row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs="*", default=CLIENTS, choices=CLIENTS, help="default: all")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1], help="default: 0 1")
    asked = parser.parse_args()
    rows = json.loads(DATA.read_text()) if DATA.exists() else []
    print("| client | seed | held-out before | held-out after | train seconds | worst gap (nats) |")
    print("|---|---|---|---|---|---|")
    for client in asked.clients:
        for seed in asked.seeds:
            s = finished(client, seed)
            before, after = (
                {key: s[when][f"eval/held_out/avg@1{key}"] for key in ("", "_se")}
                for when in ("eval_before", "eval_after")
            )
            row = {
                "client": client,
                "seed": seed,
                "before": before[""],
                "before_se": before["_se"],
                "after": after[""],
                "after_se": after["_se"],
                "train_seconds": s["train_seconds"],
                "worst_logprob_gap": s["worst_logprob_gap"],
            }
            rows = [r for r in rows if (r["client"], r["seed"]) != (client, seed)] + [row]
            shown = [f"{e['']:.3f} ± {e['_se']:.3f}" for e in (before, after)]
            cells = [client, str(seed), *shown, f"{row['train_seconds']:.0f}", f"{row['worst_logprob_gap']:.1e}"]
            print("| " + " | ".join(cells) + " |", flush=True)
            DATA.write_text(json.dumps(sorted(rows, key=lambda r: (r["client"], r["seed"])), indent=1) + "\n")


if __name__ == "__main__":
    main()
