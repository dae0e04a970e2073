"""Examine the doctor: plant every fault, run what is odd but right, and write the table of docs/parity.md.

    .venv/bin/python scripts/docs/exam.py                          # about 15 minutes on two cores
    .venv/bin/python scripts/docs/exam.py --only "log2" "packs"    # some faults

Each fault is planted in a running engine and learner of a tiny random model, and undone afterwards: see
tests/support/planted.py. A part of the exam writes nothing but `--out`.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT)]
DATA, PAGE = ROOT / "docs" / "data" / "exam.json", ROOT / "docs" / "parity.md"
BEGIN, END = "<!-- exam: written by scripts/docs/exam.py -->", "<!-- end of exam -->"
DTYPES = ("float32", "bfloat16")
VERDICTS = ("named", "wrong", "unexplained", "silent", "crash")


def main() -> None:
    """Run the exam, or a part of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="faults and clean runs whose name contains a text")
    parser.add_argument("--dtype", choices=DTYPES, help="default: both")
    parser.add_argument("--part", choices=("faults", "clean"), help="default: both")
    parser.add_argument("--page", action="store_true", help="only write the page from docs/data/exam.json")
    parser.add_argument("--out", type=Path, help="file for the figures")
    args = parser.parse_args()
    if args.page:
        return write(json.loads(DATA.read_text()))
    rows = [] if args.part == "clean" else faults(args.only, [args.dtype] if args.dtype else list(DTYPES))
    clean = {} if args.part == "faults" else runs(args.only)
    print("\n" + summary(rows, clean))
    found = {"faults": rows, "clean": clean}
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    if not (args.only or args.dtype or args.part):
        DATA.write_text(json.dumps(found, indent=1) + "\n")
        write(found)
    return None


def faults(only: list[str], dtypes: list[str]) -> list[dict[str, Any]]:
    """A row for each fault, model and dtype."""
    from exam import Bench, faults_named, rows, run_row

    bench, found = Bench(), []
    try:
        for fault, model, dtype in rows(faults_named(only), dtypes):
            row = run_row(bench, fault, model, dtype)
            found.append(asdict(row))
            text = f"{row.dtype} {row.model} {row.fault}: {row.verdict.upper()} {row.cause} ({row.where})"
            print(f"{text} {row.seconds:.1f} s {row.changed} {row.note}", flush=True)
            if row.verdict not in ("named", "silent"):
                print(f"    right: {', '.join(row.right)}. {row.text[:400]}", flush=True)
    finally:
        bench.close()
    return found


def runs(only: list[str]) -> dict[str, list[str]]:
    """What the doctor found in each clean run."""
    from clean_runs import run_all

    found = {}
    for name, seen in run_all(only):
        found[name] = seen
        print(f"clean run: {name}: {seen or 'nothing'}", flush=True)
    return found


def summary(rows: list[dict[str, Any]], clean: dict[str, list[str]]) -> str:
    """How many faults had which verdict, and how many clean runs had a false alarm."""
    lines = [
        "| runs | faults | " + " | ".join(VERDICTS) + " | share named |",
        "|---|---|" + "---|" * (len(VERDICTS) + 1),
    ]
    for dtype in DTYPES:
        of = [r for r in rows if r["dtype"] == dtype]
        parts = {dtype: of, f"{dtype}, those that hurt": [r for r in of if r["hurts"]]}
        for name, part in parts.items():
            if part and (name == dtype or len(part) < len(of)):
                n = Counter(r["verdict"] for r in part)
                share = f"{n['named'] / len(part):.0%}"
                lines.append(f"| {name} | {len(part)} | {' | '.join(str(n[v]) for v in VERDICTS)} | {share} |")
    alarms = [name for name, seen in clean.items() if seen]
    if clean:
        lines += ["", f"False alarms in {len(clean)} clean runs: {len(alarms)}{f' ({alarms})' if alarms else ''}."]
    if notes := [f"{r['dtype']} {r['model']} {r['fault']}: {r['note']}" for r in rows if r["note"]]:
        lines += ["", "Defects of the bed: " + "; ".join(notes) + "."]
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """What was found first for each fault, by dtype."""
    lines = ["| side | planted | right | float32 | bfloat16 |", "|---|---|---|---|---|"]
    keys = dict.fromkeys((r["side"], r["fault"], r["model"]) for r in rows)
    for side, fault, model in sorted(keys, key=lambda key: [r["side"] for r in rows].index(key[0])):
        of = {r["dtype"]: r for r in rows if (r["side"], r["fault"], r["model"]) == (side, fault, model)}
        right = ", ".join(f"`{cause}`" for cause in next(iter(of.values()))["right"])
        name = fault if model in ("qwen2-untied", "qwen2-lora") else f"{fault} ({model})"
        lines.append(f"| {side} | {name} | {right} | {' | '.join(cell(of.get(dtype)) for dtype in DTYPES)} |")
    return "\n".join(lines)


def cell(row: dict[str, Any] | None) -> str:
    """The verdict on one fault in one dtype."""
    if row is None:
        return "-"
    if row["verdict"] == "named":
        return f"`{row['cause']}`"
    return f"wrong: `{row['cause']}` ({row['where']})" if row["verdict"] == "wrong" else row["verdict"]


def write(found: dict[str, Any]) -> None:
    """The tables, between the marks of the page."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"{PAGE} has no marks {BEGIN} and {END}"
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(found)}\n\n{END}{after}")


def tables(found: dict[str, Any]) -> str:
    """The summary and the table of all faults."""
    return f"{summary(found['faults'], found['clean'])}\n\n{table(found['faults'])}"


if __name__ == "__main__":
    main()
