"""What do the recipes with environments learn? Run them, and write the table of docs/tutorials/your-environment.md.

    python scripts/docs/episodes.py                            # 5 runs, about half an hour on two cores
    python scripts/docs/episodes.py calculator-0 lookup-0      # these alone: a recipe and a seed
    python scripts/docs/episodes.py --page                     # run nothing: the table from the stored figures

The figures are kept in docs/data/calculator.json. A run that has a summary in runs/seeds/ is not run again.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts" / "bench"), str(ROOT / "scripts" / "docs")]

from seeds import finished, held_out  # noqa: E402
from written import write_or_check  # noqa: E402

DATA, PAGE = ROOT / "docs" / "data" / "calculator.json", ROOT / "docs" / "tutorials" / "your-environment.md"
RUNS = ["calculator-0", "calculator-1", "calculator-2", "lookup-0", "guess_the_number-0"]
BEGIN, END = "<!-- Written by scripts/docs/episodes.py. -->\n", "<!-- End of what it writes. -->\n"
HEAD = """
| recipe | seed | held-out before | held-out after | train seconds | tokens | worst gap of a turn (nats) |
|---|---|---|---|---|---|---|
"""


def measured(run: Path) -> dict[str, Any]:
    """The figures of a run from its folder."""
    summary = json.loads((run / "summary.json").read_text())
    kept = ["seed", "status", "steps", "eval_before", "eval_after", "start_seconds", "train_seconds", "tokens"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward/mean" in row]
    found = {name: summary[name] for name in [*kept, "ledger"]}
    found["worst_gap_of_a_turn"] = max(row["rollout_corr/logprob_abs_diff_worst_turn"] for row in steps)
    return found | {name: [row[name] for row in steps] for name in ("reward/mean", "episode/turns")}


def machine() -> str:
    """The processor, and how many cores of it were free to use."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else 'an unknown processor'}"


def table(runs: dict[str, Any]) -> str:
    """The rows of the page; nothing where nothing is measured."""
    rows = []
    for name, run in runs.items():
        cells = [f"`{name.rpartition('-')[0]}`", run["seed"], held_out(run["eval_before"]), held_out(run["eval_after"])]
        cells += [f"{run['train_seconds']:.0f}", f"{run['tokens']:,}", f"{run['worst_gap_of_a_turn']:.1e}"]
        rows.append("| " + " | ".join(map(str, cells)) + " |\n")
    return HEAD + "".join(rows) + "\n" if rows else ""


def page(runs: dict[str, Any]) -> str:
    """The page with the table of these runs."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before + BEGIN + table(runs) + END + rest.partition(END)[2]


def main(words: list[str]) -> int:
    """Run what is asked for, keep its figures, and write the page. Exit status: 1 with `--check` for an old page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=RUNS, help=f"default: {' '.join(RUNS)}")
    parser.add_argument("--page", action="store_true", help="run nothing, and write the page")
    parser.add_argument("--check", action="store_true", help="run nothing, and say whether the page is up to date")
    parser.add_argument("--flags", default="", help='for the recipes, such as --flags="--steps 1"')
    asked = parser.parse_args(words)
    found = json.loads(DATA.read_text()) if DATA.exists() else {"runs": {}}
    for run in [] if asked.page or asked.check else asked.runs:
        recipe, _, seed = run.rpartition("-")
        found["runs"][run] = measured(finished(recipe, int(seed), asked.flags.split()))
        ordered = {name: found["runs"][name] for name in sorted(found["runs"], key=[*RUNS, *asked.runs].index)}
        found = {"command": "python scripts/docs/episodes.py", "machine": machine(), "runs": ordered}
        DATA.write_text(json.dumps(found, indent=1) + "\n")
    return write_or_check(PAGE, page(found["runs"]), check=asked.check)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
