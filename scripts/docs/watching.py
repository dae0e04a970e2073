"""What do the record of a run and its page cost? Measured in real Chromium, and in CPU seconds.

    python scripts/docs/watching.py page                  # a group of 8 x 4,096 tokens, from a server and from a file
    python scripts/docs/watching.py million               # 1,000,000 sequences of 350 tokens: 2 GB below --folder
    python scripts/docs/watching.py record                 # steps of the quickstart's shape, with and without a record

`page` and `million` start `unison view` as its user does. A time ends with the frame that shows the answer, as the
page's own clock has it. `record` runs everything in one process with one thread and counts CPU seconds, so what else
runs on the machine has little influence; pairs alternate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

ROOT = Path(__file__).parents[2]
for place in (ROOT, ROOT / "scripts" / "docs", ROOT / "tests" / "support"):
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
    """Measure one part, print its figures, and end with status 1 where a bound is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("page", "million", "record"))
    parser.add_argument(
        "--folder", type=Path, help="where the runs of `page` and `million` are written (default: /tmp)"
    )
    parser.add_argument("--sequences", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=350)
    parser.add_argument("--pairs", type=int, default=6, help="steps of a learner with and without; 0: the record alone")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        if asked.part == "page":
            found = page(Path(folder))
        elif asked.part == "million":
            found = million(Path(folder), asked.sequences, asked.tokens)
        else:
            found = record(asked.pairs)
    passed = {name: min(values) <= most for name, (values, most) in found.items() if most is not None}
    for name, (values, most) in found.items():
        print(
            json.dumps({"what": name, "value": [round(x, 4) for x in values], "bound": most, "held": passed.get(name)})
        )
    sys.exit(not all(passed.values()))


Figures = dict[str, tuple[tuple[float, ...], float | None]]
"""By name: a figure, or seconds by the clock and CPU seconds of browser and server, and the bound. Other work on a
machine makes the first longer, so one of the two must be below the bound."""


class Clock:
    """CPU seconds of processes and all that they started."""

    def __init__(self, *pids: int) -> None:
        self.pids = pids

    def seconds(self) -> float:
        parents, spent = {}, {}
        for file in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has ended
                fields = file.read_text().rpartition(")")[2].split()
                pid = int(file.parent.name)
                parents[pid], spent[pid] = int(fields[1]), sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        return sum(spent[pid] for pid in spent if self._ours(pid, parents))

    def _ours(self, pid: int, parents: dict[int, int]) -> bool:
        while pid not in self.pids and pid in parents:
            pid = parents[pid]
        return pid in self.pids

    def of(self, work: Callable[[], float | list[float]], times: int) -> tuple[float, float]:
        """Median seconds that `work` returns in so many calls, and CPU seconds of one."""
        began, found = self.seconds(), [work() for _ in range(times)]
        return statistics.median(found), (self.seconds() - began) / times


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
    size = sum((HERE / name).stat().st_size for name, _ in FILES.values())
    found: Figures = {"bytes of the page": ((size,), 250_000)}
    browser = Browser()
    browser.call("Page.addScriptToEvaluateOnNewDocument", source=FIRST)
    try:
        with viewing(run) as (url, pid):
            clock = Clock(browser.process.pid, pid)
            for name, address in (("server", url), ("file", (folder / "long.html").as_uri())):
                paint = clock.of(lambda at=address: first_paint(browser, f"{at}#/group/1/0"), 5)
                found[f"first paint of the group from a {name}, s"] = (paint, 1.0)
                browser.js(HOVER)
                points = iter(places(browser))
                found[f"hover from a {name}, s"] = (clock.of(lambda on=points: hover(browser, next(on)), 30), 0.05)
            browser.open(url)
            rows = iter(range(8))
            paint = clock.of(lambda: painted(browser, f"#/row/1/0/{next(rows)}/0"), 8)
            found["one sequence of 4,096 tokens on the page, s"] = (paint, 0.2)
            complaints = browser.complaints()
        own = (url, (folder / "long.html").as_uri(), "about:", "data:")
        others = [asked for asked in browser.requests() if not asked.startswith(own)]
        found["requests to other hosts"] = ((len(others),), 0)
        found["errors of scripts and of the policy"] = ((len(complaints),), 0)
    finally:
        browser.close()
    return found


def first_paint(browser: Any, url: str) -> float:
    """Seconds from the begin of the navigation to the frame that shows the whole view."""
    browser.open(url)
    browser.wait("window.first > 1")
    return browser.js("window.first") / 1000


def painted(browser: Any, view: str) -> float:
    """Seconds from the change of the address to the frame that shows the view."""
    go = f"window.began = performance.now(); location.hash = {json.dumps(view)}; undefined"
    browser.js(f"delete document.body.dataset.shown; {go}")
    look = "const look = () => document.body.dataset.shown == null ? setTimeout(look, 1) : done(); look();"
    browser.js(f"new Promise(done => {{ {look} }}).then(() => {PAINTED})")
    return browser.js("performance.now() - began") / 1000


def places(browser: Any) -> list[list[float]]:
    """Where tokens are in the window, in an order in which no neighbours follow each other."""
    found = browser.js(
        """[...document.querySelectorAll('.tokens span')].slice(0, 9000).filter(x => x.s)
        .map(x => x.getBoundingClientRect()).filter(b => b.top > 100 && b.bottom < innerHeight && b.width > 2)
        .map(b => [b.x + b.width / 2, b.y + b.height / 2])"""
    )
    return found[:: max(1, len(found) // 40)]


def hover(browser: Any, place: list[float]) -> float:
    """Seconds from a real movement of the mouse to the frame that explains the token below it."""
    before = browser.js("hovers.length")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    browser.wait(f"hovers.length > {before}")
    return browser.js("hovers.at(-1)") / 1000


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
    found: Figures = {"bytes a token on the disk": ((size / (sequences * tokens),), None)}
    browser, last = Browser(), sequences // rows
    browser.call("Page.addScriptToEvaluateOnNewDocument", source=FIRST)
    try:
        with viewing(run) as (url, pid):
            clock = Clock(browser.process.pid, pid)
            found["open the run, s"] = (clock.of(lambda: first_paint(browser, url), 1), 2.0)
            for column in ("reward", "entropy", "tokens"):
                code = SORT.replace("NAME", column)
                found[f"sort by {column}, s"] = (clock.of(lambda of=code: browser.js(of) / 1000, 1), 1.0)
            for where in ("reward<0.001", "gap_max>0.999 clip_frac<0.5", "state=filtered", "overlong"):
                path = "rows?limit=200&where=" + quote(where)
                found[f"search {where}, s"] = (clock.of(lambda of=path: answer(browser, of), 1), 1.0)
            steps = [7, last // 4, last // 2, last - 3]
            for what, bound, form in (
                ("answer with the rows of a step", 0.2, "rows?step={}&limit=5000"),
                ("answer with the 8 sequences of a group", 0.2, "sequences?step={}&group=5"),
            ):
                ask = iter(form.format(step) for step in steps)
                found[f"{what}, s"] = (clock.of(lambda of=ask: answer(browser, next(of)), len(steps)), bound)
            for what, bound, form in (
                ("one sequence on the page", 0.2, "#/row/{}/9/3/0"),
                ("a step of 1,000 rows on the page", None, "#/step/{}"),
            ):
                views = iter(form.format(step + 1) for step in steps)
                found[f"{what}, s"] = (clock.of(lambda of=views: painted(browser, next(of)), len(steps)), bound)
            status = Path(f"/proc/{pid}/status").read_text()
            peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 2**20
            found["largest memory of the server, GiB"] = ((peak,), 1.0)
    finally:
        browser.close()
    return found


def answer(browser: Any, path: str) -> float:
    """Seconds until the page has the answer to a path."""
    code = f"const t = performance.now(); await get('{path}'); return (performance.now() - t) / 1000;"
    return browser.js(f"(async () => {{ {code} }})()")


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


def record(pairs: int) -> Figures:
    """Steps of the quickstart's shape: the record's own work, and whole steps of the learner with it and without."""
    import numpy as np
    from made_up_run import step_of

    from trainer.prompts import load_tokenizer

    rng, tokenizer = np.random.default_rng(1), load_tokenizer(str(ROOT / "models" / "smollm2-135m"))
    steps = [step_of(step, tokenizer, rng)[:2] for step in range(1, 13)]
    with tempfile.TemporaryDirectory() as folder:
        own, size = own_work(Path(folder), steps, tokenizer)
    step_s = quickstart_s()
    found: Figures = {
        "CPU seconds of the record's own work for a step": ((own,), None),
        "seconds of a step of the quickstart (docs/data/quickstart.json)": ((step_s,), None),
        "share of a step": ((own / step_s,), 0.02),
        "bytes a token of 48 replies of some 15 tokens": ((size,), None),
    }
    for passes, moved in (("one pass a step, as by default", 0.0), ("several passes a step", 1e-2)):
        with tempfile.TemporaryDirectory() as folder:
            size = long_replies(Path(folder), moved)
        found[f"bytes a token of 512 replies of 350 tokens, {passes}"] = ((size,), 6.0)
    if pairs:
        with tempfile.TemporaryDirectory() as folder:
            shares = paired(Path(folder), steps, tokenizer, pairs)
        found["share of the learner's step alone, median of pairs"] = ((statistics.median(shares),), 0.02)
        found["the same, smallest and largest pair"] = ((min(shares), max(shares)), None)
    return found


def quickstart_s() -> float:
    """Seconds of a step of the quickstart, with its share of the evaluations between steps: the middle seed's."""
    runs = json.loads((ROOT / "docs" / "data" / "quickstart.json").read_text())["runs"]
    return statistics.median(run["train_seconds"] for run in runs) / 12


def recorder(folder: Path, tokenizer: Any) -> Any:
    from rl.config import Config
    from rl.types import Data
    from trainer.record.recorder import RunRecord

    config = Config(name="t", model="m", data=lambda: Data(train=[]), reward=len)
    return RunRecord(folder, config, tokenizer=tokenizer, after=0, alert=print, alerts=[])


def recorded(kept: Any, step: int, told: list[Any], seen: list[Any]) -> None:
    """All that the loop tells a record in one step; returns when the step is on the disk."""
    import threading

    for group in {one.trajectory.group for one in told}:
        for state in ("admitted", "sampling", "scoring", "ready", "training", "trained"):
            kept.moved(group, state)
    kept.seen, done = seen, threading.Event()
    kept.trained(step, [one.trajectory for one in told if one.end == "trained"])
    kept.writer._waiting.put(lambda folder: done.set())
    done.wait()


def own_work(folder: Path, steps: list[Any], tokenizer: Any) -> tuple[float, float]:
    """CPU seconds of a step: what is kept of each pass, the events, the table and the file; and bytes of a token."""
    import torch

    from rl.batch import collate
    from rl.episodes.seen import Watching
    from rl.types import PolicyOutput

    kept, seconds, tokens = recorder(folder, tokenizer), [], 0
    for number, (told, seen) in enumerate(steps, 1):
        rows = [one.trajectory for one in told if one.end == "trained"]
        batch = collate(rows)
        tokens += sum(len(row.token_ids) for row in rows)
        zero = torch.zeros(batch.mask.shape)
        watching = Watching(batch.mask.shape, False)
        began = time.process_time()
        for micro in torch.arange(len(rows)).split(4):  # the quickstart's micro-batches hold about four rows
            part = replace(batch, mask=batch.mask[micro], old_logprobs=zero[micro])
            policy = PolicyOutput(logprobs=zero[micro], entropy=zero[micro])
            watching.add(micro, None, part, policy, zero[micro], {})
            watching.gradient(micro, part.mask, zero[micro])
        watching.seen()
        recorded(kept, number, told, seen)
        seconds.append(time.process_time() - began)
    kept.close()
    return statistics.median(seconds[1:]), sum(each.bytes for each in kept.writer.kept.values()) / tokens


def long_replies(folder: Path, moved: float) -> float:
    """Bytes of a token of 512 replies of 350 tokens, whose numbers are spread as those of a real model; `moved` nats is
    what the step's passes changed."""
    import numpy as np
    import torch

    from planted_run import row
    from rl.episodes.seen import NUMBERS, Seen
    from trainer.record.table import Told, table_of
    from trainer.record.writer import Writer

    rng, n, rows = np.random.default_rng(0), 350, []
    words = rng.permutation(49_000)
    for i in range(512):
        one = row(group=i // 8, episode=i % 8, sampled=n, prompt=60, reward=float(i % 3 == 0))
        sampled = (-np.minimum(rng.lognormal(-2.0, 2.0, n), 20.0)).tolist()
        ids = words[rng.zipf(1.3, n + 60) % 49_000].tolist()
        rows.append(replace(one, logprobs=[0.0] * 60 + sampled, token_ids=ids))
    told = [Told(trajectory=one) for one in rows]
    rollout = torch.tensor([one.logprobs[1:] for one in rows])
    old = rollout + torch.randn(rollout.shape) * 1e-6
    numbers = {"old": old, "now": old + torch.randn(rollout.shape) * moved, "weight": torch.ones(rollout.shape)}
    numbers |= {"entropy": -rollout * torch.rand(rollout.shape), "advantage": torch.randn(512, 1).expand(rollout.shape)}
    flags = torch.zeros(rollout.shape, dtype=torch.int16)
    seen = Seen(rows=torch.arange(512), numbers={k: numbers[k] for k in NUMBERS}, flags=flags, old_is_rollout=False)
    writer = Writer(folder, keep="all", most_bytes=1e12, after=0, alerts=set)
    writer.close()
    writer._write(1, table_of(1, told, [seen]), "all")
    return writer.kept[1].bytes / (512 * (n + 60))


def paired(folder: Path, steps: list[Any], tokenizer: Any, pairs: int) -> list[float]:
    """What the record adds to the CPU seconds of a learner's step, as a share: one value for each pair."""
    import torch

    from live import engine_config
    from pair import make_learner
    from rl.batch import collate
    from rl.config import TrainerConfig
    from rl.objectives import GSPO

    torch.set_num_threads(1)
    trainer = TrainerConfig(lr=1e-7, zero_stage=0, micro_batch_tokens=256)
    config = engine_config(ROOT / "models" / "smollm2-135m", objective=GSPO(), trainer=trainer)
    off = replace(config, tracking=replace(config.tracking, rollouts="off"))
    learner, kept = make_learner(config), recorder(folder, tokenizer)

    def one(step: int, on: bool) -> float:
        told = steps[step % len(steps)][0]
        learner.stepper.rank = replace(learner.parts, config=config if on else off)
        batch, began = collate([row.trajectory for row in told if row.end == "trained"]), time.process_time()
        learner.step(batch)
        seen, spans = learner.told()
        if on:
            for name, start, end in spans:
                kept.timeline.span("learner rank", 0, name, start, end)
            recorded(kept, step + 1, told, [seen])
        return time.process_time() - began

    one(0, False)
    found = []
    for pair in range(pairs):
        first = one(pair, pair % 2 == 0)
        second = one(pair, pair % 2 == 1)
        on, alone = (first, second) if pair % 2 == 0 else (second, first)
        found.append((on - alone) / alone)
    kept.close()
    return found


if __name__ == "__main__":
    main()
