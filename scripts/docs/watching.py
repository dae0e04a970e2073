"""What do the record of a run and its page cost? Measured in real Chromium, and in CPU seconds.

    python scripts/docs/watching.py page                  # a group of 8 x 4,096 tokens, from a server and from a file
    python scripts/docs/watching.py million               # 1,000,000 sequences of 350 tokens: 2 GB below --folder
    python scripts/docs/watching.py record runs/quickstart       # the steps of that run again, with and without record

`page` and `million` start `unison view` as its user does. A time ends with the frame that shows the answer, as the
page's own clock has it. `record` runs everything in one process with one thread and counts CPU seconds, so what else
runs on the machine has little influence; pairs alternate.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
for place in (ROOT, ROOT / "tests" / "support"):
    sys.path.insert(0, str(place))
PAINTED = "new Promise(done => requestAnimationFrame(() => setTimeout(() => done(performance.now()), 0)))"
FIRST = """new MutationObserver(() => { if (document.body?.dataset.shown == null || window.first) return;
  window.first = 1; requestAnimationFrame(() => setTimeout(() => { window.first = performance.now(); }, 0)); })
  .observe(document, { subtree: true, childList: true, attributes: true });"""
HOVER = """window.hovers = []; addEventListener('mouseover', e => { if (e.target.s) requestAnimationFrame(() =>
  setTimeout(() => hovers.push(performance.now() - e.timeStamp), 0)); }, true); undefined"""
SORT = """(async () => { const began = performance.now(), old = document.querySelector('main table:last-of-type');
  [...document.querySelectorAll('th button')].find(b => b.textContent.startsWith('NAME')).click();
  while (old.isConnected) await new Promise(done => setTimeout(done, 1));
  await PAINTED; return performance.now() - began; })()""".replace("PAINTED", PAINTED)


def main() -> None:
    """Measure one part, print its figures as JSON, and end with status 1 where a bound is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("page", "million", "record"))
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run of recipes/quickstart.py, for `record`")
    parser.add_argument(
        "--folder", type=Path, help="where the runs of `page` and `million` are written (default: /tmp)"
    )
    parser.add_argument("--sequences", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=350)
    parser.add_argument("--pairs", type=int, default=6)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        if asked.part == "page":
            found = page(Path(folder))
        elif asked.part == "million":
            found = million(Path(folder), asked.sequences, asked.tokens)
        else:
            found = record(asked.run, Path(folder), asked.pairs)
    passed = {name: value <= most for name, (value, most) in found.items() if most is not None}
    shown = {name: {"value": round(value, 4), "bound": most} for name, (value, most) in found.items()}
    print(json.dumps(shown, indent=1))
    sys.exit(not all(passed.values()))


Figures = dict[str, tuple[float, float | None]]


@contextmanager
def viewing(run: Path) -> Iterator[tuple[str, int]]:
    """`unison view` in a process of its own; its address and its process."""
    command = [sys.executable, "-c", "from trainer.cli import main; main()", "view", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            yield next(word for word in process.stdout.readline().split() if word.startswith("http")), process.pid
        finally:
            process.terminate()


def page(folder: Path) -> Figures:
    """A group of 8 long replies: first paint, hover, bytes of the page, and who is asked."""
    from browser import Browser
    from trainer.view.answers import Answers
    from trainer.view.server import FILES, HERE, export

    run = long_group(folder / "long")
    (folder / "long.html").write_text(export(Answers(run)), encoding="utf-8")
    found: Figures = {"bytes of the page": (sum((HERE / name).stat().st_size for name, _ in FILES.values()), 250_000)}
    browser = Browser()
    browser.call("Page.addScriptToEvaluateOnNewDocument", source=FIRST)
    try:
        with viewing(run) as (url, _):
            for name, address in (("server", url), ("file", (folder / "long.html").as_uri())):
                began = [first_paint(browser, f"{address}#/group/1/0") for _ in range(5)]
                found[f"first paint of the group from a {name}, s"] = (statistics.median(began), 1.0)
                times = sorted(hovers(browser, 40))
                found[f"hover from a {name}, median ms"] = (times[len(times) // 2], 50.0)
                found[f"hover from a {name}, largest ms"] = (times[-1], 200.0)
            paints = [painted(browser, f"#/row/1/0/{n}/0") for n in range(4)]
            found["one sequence of 4,096 tokens on the page, median ms"] = (statistics.median(paints), 200.0)
        own = (url, (folder / "long.html").as_uri(), "about:", "data:")
        others = [asked for asked in browser.requests() if not asked.startswith(own)]
        found["requests to other hosts"] = (len(others), 0)
        found["errors of scripts and of the policy"] = (len(browser.complaints()), 0)
    finally:
        browser.close()
    return found


def first_paint(browser: Any, url: str) -> float:
    """Seconds from the begin of the navigation to the frame that shows the whole view."""
    browser.open(url)
    browser.wait("window.first > 1")
    return browser.js("window.first") / 1000


def painted(browser: Any, view: str) -> float:
    """Milliseconds from the change of the address to the frame that shows the view."""
    go = f"window.began = performance.now(); location.hash = {json.dumps(view)}; undefined"
    browser.js(f"delete document.body.dataset.shown; {go}")
    browser.js("""new Promise(done => { const look = () => document.body.dataset.shown == null ? setTimeout(look, 1)
      : requestAnimationFrame(() => setTimeout(() => { window.ended = performance.now(); done(); }, 0)); look(); })""")
    return browser.js("ended - began")


def hovers(browser: Any, number: int) -> list[float]:
    """Milliseconds from a real movement of the mouse to the frame that explains the token below it."""
    browser.js(HOVER)
    places = browser.js(
        """[...document.querySelectorAll('.tokens span')].filter(x => x.s).map(x => x.getBoundingClientRect())
        .filter(b => b.top > 100 && b.bottom < innerHeight && b.width > 2)
        .map(b => [b.x + b.width / 2, b.y + b.height / 2])"""
    )
    for x, y in places[:: max(1, len(places) // number)]:
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        browser.js(PAINTED)
    return browser.js("hovers")


def long_group(run: Path) -> Path:
    """One step with a group of 8 replies of 4,096 tokens each."""
    import numpy as np
    import torch

    from planted_run import row, write
    from rl.episodes.seen import NUMBERS, Seen
    from trainer.record.table import Told

    rng, n = np.random.default_rng(0), 4096
    ids = [rng.integers(97, 123, n + 2).tolist() for _ in range(8)]
    told = [Told(trajectory=replace(row(episode=e, sampled=n), token_ids=ids[e])) for e in range(8)]
    numbers = {name: torch.randn(8, n + 1) for name in NUMBERS}
    flags = torch.zeros(8, n + 1, dtype=torch.int16)
    write(run, {1: (told, [Seen(rows=torch.arange(8), numbers=numbers, flags=flags, old_is_rollout=False)])})
    return run


def million(folder: Path, sequences: int, tokens: int) -> Figures:
    """A run of so many sequences: open, search, sort, one step, one sequence, and the server's memory."""
    from browser import Browser

    run, rows = folder / "million", 1000
    size = many(run, sequences // rows, rows, tokens)
    found: Figures = {"bytes a token on disk": (size / (sequences * tokens), None)}
    browser = Browser()
    browser.call("Page.addScriptToEvaluateOnNewDocument", source=FIRST)
    try:
        began = time.perf_counter()
        with viewing(run) as (url, pid):
            found["start of the command, s"] = (time.perf_counter() - began, None)
            found["open the run, s"] = (first_paint(browser, url), 2.0)
            for column in ("gap max", "reward", "entropy", "tokens"):
                if column != "gap max":  # it is sorted by that one already
                    found[f"sort by {column}, s"] = (browser.js(SORT.replace("NAME", column)) / 1000, 1.0)
            for where in ("reward<0.001", "gap_max>0.999 clip_frac<0.5", "state=filtered", "overlong"):
                asked = f"performance.now() - await get('rows?limit=200&where={where}'.replace('>', '%3E'))"
                asked = asked.replace("performance.now() - await", "await")
                code = f"(async () => {{ const t = performance.now(); {asked}; return performance.now() - t; }})()"
                found[f"search {where}, s"] = (browser.js(code) / 1000, 1.0)
            steps = [7, sequences // rows // 2, sequences // rows - 3]
            found["one step, median ms"] = (statistics.median(painted(browser, f"#/step/{s}") for s in steps), None)
            answers = [answer(browser, f"rows?step={step}&limit=5000") for step in steps]
            found["answer with the rows of a step, median ms"] = (statistics.median(answers), 200.0)
            answers = [answer(browser, f"sequences?step={step}&group=5") for step in steps]
            found["answer with a group's 8 sequences, median ms"] = (statistics.median(answers), 200.0)
            found["one sequence on the page, median ms"] = (
                statistics.median(painted(browser, f"#/row/{step}/9/{e}/0") for step in steps for e in (0, 1)),
                200.0,
            )
            status = Path(f"/proc/{pid}/status").read_text()
            peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 2**20
            found["largest memory of the server, GiB"] = (peak, 1.0)
    finally:
        browser.close()
    return found


def answer(browser: Any, path: str) -> float:
    """Milliseconds until the page has the answer to a path."""
    return browser.js(
        f"(async () => {{ const t = performance.now(); await get('{path}'); return performance.now() - t; }})()"
    )


def many(run: Path, steps: int, rows: int, tokens: int) -> int:
    """Write a run whose scalars are drawn anew for each step; returns the bytes of its record. All steps share the
    numbers of their tokens."""
    import numpy as np
    import pyarrow as pa

    from planted_run import row, write
    from trainer.record.table import BITS, COUNTS, REAL, SCHEMA, TEXTS, WHOLE, Told, shortened
    from trainer.record.writer import Writer

    write(run, {1: ([Told(trajectory=row())], [])})
    rng, lists = np.random.default_rng(0), {}
    starts = pa.array(np.arange(0, rows * tokens + 1, tokens), pa.int32())
    sizes = {"gap": 1e-6, "moved": 1e-2, "weight_at": 0.0, "rollout": 1.0, "entropy_at": 1.0, "advantage_at": 1.0}
    for name, bits in BITS.items():
        flat = rng.normal(size=rows * tokens) * sizes[name] if sizes[name] else np.ones(rows * tokens)
        if name == "advantage_at":
            flat = rng.normal(size=rows).repeat(tokens)
        lists[name] = pa.ListArray.from_arrays(starts, shortened(flat, bits))
    for name, kind in COUNTS.items():
        flat = rng.zipf(1.3, rows * tokens) % 256 if name == "ids" else np.zeros(rows * tokens)
        lists[name] = pa.ListArray.from_arrays(starts, flat.astype(kind))
    writer = Writer(run / "rollouts", keep="all", most_bytes=1e12, after=0, alerts=set)
    writer.close()
    for step in range(1, steps + 1):
        columns: dict[str, Any] = {name: rng.random(rows) for name in REAL}
        columns |= {name: rng.integers(0, 1000, rows) for name in WHOLE}
        columns |= {name: [""] * rows for name in TEXTS} | {"old_is_rollout": [False] * rows}
        kept = rng.random(rows) < 0.9
        columns["state"] = np.where(kept, "trained", "filtered")
        columns["reason"] = np.where(kept, "", rng.choice(["too_old", "overlong"], rows))
        columns["parts"] = [json.dumps({"right": round(float(x), 3)}) for x in columns["reward"]]
        order = np.arange(rows)
        columns |= {"step": np.full(rows, step), "group": order // 8, "episode": order % 8, "row": order * 0}
        writer._write(step, pa.Table.from_pydict({**columns, **lists}, schema=SCHEMA), "all")
    lines = [json.dumps({"step": float(s), **dict.fromkeys(METRICS, float(rng.random()))}) for s in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return sum(entry.bytes for entry in writer.kept.values())


METRICS = ["reward/mean", "actor/entropy", "actor/clip_frac", "staleness/mean", *(f"odd/{i}" for i in range(80))]


def record(run: Path, folder: Path, pairs: int) -> Figures:
    """The steps of a recorded run again: learner and record, and the learner alone."""
    import torch

    from pair import make_learner
    from recipes.quickstart import config
    from trainer.prompts import load_tokenizer
    from trainer.record.recorder import RunRecord

    torch.set_num_threads(1)
    config = replace(config, model=str(ROOT / "models" / "smollm2-135m"))
    off = replace(config, tracking=replace(config.tracking, rollouts="off"))
    learner = make_learner(config)
    tokenizer = load_tokenizer(config.model)
    kept = RunRecord(folder, config, tokenizer=tokenizer, after=0, alert=print, alerts=[])
    steps, seconds = list(recorded_steps(run)), {True: [], False: []}

    def one(step: int, on: bool) -> float:
        rows = steps[step % len(steps)]
        learner.parts.config = config if on else off
        began = time.process_time()
        if on:
            for group in {row.group for row in rows}:
                for state in ("admitted", "sampling", "scoring", "ready", "training", "trained"):
                    kept.moved(group, state)
        learner.step(collated(rows))
        seen, spans = learner.told()
        if on:
            for name, start, end in spans:
                kept.timeline.span("learner rank", 0, name, start, end)
            kept.seen = [seen]
            kept.trained(step + 1, rows)
            drained(kept)
        return time.process_time() - began

    one(0, False)
    for pair in range(pairs):
        for on in (True, False) if pair % 2 else (False, True):
            seconds[on].append(one(pair, on))
    kept.close()
    more = [(a - b) / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    entries = kept.writer.kept.values()
    step_s = statistics.median(row["timing_s/step"] for row in rows_of(run / "metrics.jsonl") if row["step"])
    cost = statistics.median(a - b for a, b in zip(seconds[True], seconds[False], strict=True))
    return {
        "CPU seconds of the learner's step, median": (statistics.median(seconds[False]), None),
        "CPU seconds that the record adds, median": (cost, None),
        "smallest pair": (min(more), None),
        "largest pair": (max(more), None),
        "share of the learner's step that the record adds, median": (statistics.median(more), 0.02),
        "share of the run's whole step": (cost / step_s, 0.02),
        "bytes a token": (sum(e.bytes for e in entries) / sum(e.tokens for e in entries), None),
    }


def drained(kept: Any) -> None:
    """Wait until the record's thread has nothing to do."""
    import threading

    done = threading.Event()
    kept.writer._waiting.put(lambda folder: done.set())
    done.wait()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def collated(rows: list[Any]) -> Any:
    from rl.batch import collate

    return collate(rows)


def recorded_steps(run: Path) -> Iterator[list[Any]]:
    """The trained rows of each step of a run's record, as the loop gave them to the learner."""
    import pyarrow.parquet as pq

    from rl.types import Trajectory

    for file in sorted((run / "rollouts").glob("step-*.parquet")):
        kept = [row for row in pq.read_table(file).to_pylist() if row["state"] == "trained"]
        yield [
            Trajectory(
                group=row["group"],
                episode=row["episode"],
                token_ids=row["ids"],
                mask=[not flags & 3 for flags in row["flags"]],
                logprobs=row["rollout"],
                versions=row["version"],
                reward=row["reward"],
            )
            for row in kept
        ]


if __name__ == "__main__":
    main()
