"""Start the quickstart's engine again and again, and examine each start: how often is one of them wrong?

    python scripts/soak/soak.py                          # 200 starts, about 30 s each on two calm cores
    python scripts/soak/soak.py --at-a-time 5            # the next five of them; a second call continues

Half of the starts run next to a busy core, and half of them with two OpenMP threads. Each start is a row of `--out`.
A start with a finding keeps its doctor.json and doctor.html next to it, and is examined a second time.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import comb
from multiprocessing import forkserver, get_context
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests" / "support"), str(ROOT)]
OUT = ROOT / "runs" / "soak" / "starts.jsonl"
CONDITIONS = [(threads, busy) for threads in (2, 1) for busy in (False, True)]


def main() -> None:
    """Make the starts that are missing, and print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=200, help="rows of the file when all is done (default: 200)")
    parser.add_argument("--at-a-time", type=int, default=200, help="starts of this call at most (default: 200)")
    parser.add_argument("--model", default="models/smollm2-135m", help="default: models/smollm2-135m")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the rows (default: runs/soak/starts.jsonl)")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = rows(args.out)
    missing = range(len(done), min(args.starts, len(done) + args.at_a_time))
    if missing:
        for row in soak(args.model, missing, args.out.parent):
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            show(row)
    print("\n" + table(rows(args.out)))


def rows(out: Path) -> list[dict[str, Any]]:
    """The starts that a file has."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def soak(model: str, starts: range, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each start. One learner serves all of them."""
    from pair import make_learner
    from recipes.quickstart import config as quickstart
    from trainer.prompts import prepare

    config = replace(quickstart, model=str(model))
    prepared, learner, threads = prepare(config), make_learner(config), 0
    for index in starts:
        wanted, busy = CONDITIONS[index // 4 % 2 * 2 + index % 2]
        if wanted != threads:
            threads = wanted
            forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]
            os.environ["OMP_NUM_THREADS"] = str(threads)
        # Another prompt comes first each time, and meets an empty cache.
        turned = prepared.train[index % 8 :] + prepared.train[: index % 8]
        with busy_core(busy):
            yield {"start": index, "busy": busy} | start(
                config, replace(prepared, train=turned), learner, folder / f"start-{index}"
            )


def start(config: Any, prepared: Any, learner: Any, folder: Path) -> dict[str, Any]:
    """Start an engine, examine it, and end it. A start with a finding leaves its evidence in `folder`."""
    from live import Live
    from pair import Pair
    from trainer.cluster.remote import RemoteLearner
    from trainer.doctor.doctor import DoctorReport
    from trainer.doctor.examine import Examiner
    from trainer.doctor.report import save

    began, load = time.perf_counter(), os.getloadavg()
    live = Live(config, version=-1, load_format="dummy", worker_extension_cls="soak_worker.Soaked")
    try:
        started, cached = time.perf_counter() - began, cached_tokens(live.engine)
        pair = Pair(config, live, learner)
        examiner = Examiner(pair, RemoteLearner(pair, probe=prepared.train[0].token_ids), prepared, config.seed)
        check = asyncio.run(examiner.examine(0))
        row = figures(check) | {"start_s": started, "cached": dict(cached), "load": load[0]}
        row["worker"] = live.wait(live.engine.llm.collective_rpc("conditions"))[0]
        if check.findings:
            report = DoctorReport(
                config=config, check=check, comparisons=[], findings=check.findings, seconds=check.seconds
            )
            folder.mkdir(parents=True, exist_ok=True)
            save(report, folder, prepared.decode)
            row["again"] = figures(asyncio.run(examiner.examine(1)))
        return row | {"seconds": time.perf_counter() - began}
    finally:
        live.close()


def figures(check: Any) -> dict[str, Any]:
    """What one examination found, and its largest errors."""
    [weights], [sample] = check.evidence.weights, check.evidence.samples
    between = [(max(p.error, p.decode_error), f"{p.part} {p.name}") for p in weights.between]
    return {
        "mean_abs": sample.gap.mean_abs,
        "max_abs": sample.gap.max_abs,
        "tokens": sample.gap.tokens,
        "layer_error": max(layer.error for layer in weights.layers),
        "between_error": max(between)[0],
        "between": max(between)[1],
        "sampler_error": sample.sampler.error if sample.sampler else None,
        "findings": [str(f) for f in check.findings],
    }


def cached_tokens(engine: Any) -> dict[str, int]:
    """Counts, from now on, the prompt tokens of all requests and those that came from the prefix cache."""
    counts, generate = {"prompt": 0, "cached": 0}, engine.generate

    async def counted(token_ids: list[int], params: Any) -> Any:
        output = await generate(token_ids, params)
        counts["prompt"] += len(token_ids)
        counts["cached"] += output.num_cached_tokens or 0
        return output

    engine.generate = counted
    return counts


@contextmanager
def busy_core(on: bool) -> Iterator[None]:
    """A process that computes without end, until the block ends."""
    child = get_context("spawn").Process(target=spin, daemon=True)
    if on:
        child.start()
    try:
        yield
    finally:
        if on:
            child.kill()
            child.join()


def spin() -> None:
    """Compute without end."""
    while True:
        pass


def show(row: dict[str, Any]) -> None:
    """One line for a start, and what was found in it."""
    worker = row["worker"]
    print(
        f"start {row['start']}: {worker['threads']} threads, {'next to a busy core, ' if row['busy'] else ''}"
        f"mean |d| {row['mean_abs']:.1e}, layers {row['layer_error']:.1e}, between {row['between_error']:.1e} "
        f"({row['between']}), rotary {worker['rotary_error']:.1e}, {row['seconds']:.0f} s",
        flush=True,
    )
    for finding in row["findings"]:
        print(f"    {finding}\n    again: mean |d| {row['again']['mean_abs']:.1e}", flush=True)


def table(done: list[dict[str, Any]]) -> str:
    """The starts by condition, with the upper bound of the rate of events."""
    lines = [
        "| starts | number | events | rate, 95 % upper bound | mean abs d, median | largest | layers | between |",
        "|---|---|---|---|---|---|---|---|",
    ]
    parts = {f"{t} threads, {'busy' if b else 'calm'}": (t, b) for t, b in CONDITIONS}
    for name, condition in (parts | {"all": None}).items():
        of = [r for r in done if condition in (None, (r["worker"]["threads"], r["busy"]))]
        if of:
            events = sum(bool(r["findings"]) for r in of)
            gaps = [r["mean_abs"] for r in of]
            errors = [f"{max(r[k] for r in of):.1e}" for k in ("layer_error", "between_error")]
            lines.append(
                f"| {name} | {len(of)} | {events} | {upper_bound(events, len(of)):.1%} | {median(gaps):.1e} "
                f"| {max(gaps):.1e} | {' | '.join(errors)} |"
            )
    return "\n".join(lines)


def upper_bound(events: int, trials: int) -> float:
    """The rate above which so few events have a chance below 5 % (Clopper and Pearson, one-sided)."""
    low, high = events / trials, 1.0
    while high - low > 1e-9:
        rate = (low + high) / 2
        chance = sum(comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(events + 1))
        low, high = (rate, high) if chance > 0.05 else (low, rate)
    return high


if __name__ == "__main__":
    main()
