"""What does the page of a run of a million sequences cost? Opening, searching, sorting, one step, one sequence."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from costs.clock import FIRST, PAINTED, Clock, Figures, first_paint, painted, viewing

SORT = """(async () => { const began = performance.now(), old = document.querySelector('main table:last-of-type');
  [...document.querySelectorAll('th button')].find(b => b.textContent.startsWith('NAME')).click();
  while (old.isConnected) await new Promise(done => setTimeout(done, 1));
  await PAINTED; return performance.now() - began; })()""".replace("PAINTED", PAINTED)
METRICS = ["reward/mean", "actor/entropy", "actor/clip_frac", "staleness/mean", *(f"odd/{i}" for i in range(80))]


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
            paint = clock.of(lambda: first_paint(browser, url), 1)
            found["open the run: the page with its curves, s"] = (paint, 2.0)
            seconds, cpu = clock.of(lambda: rows_shown(browser), 1)
            found["open the run: with the rows of all steps, s"] = ((seconds, paint[1] + cpu), 2.0)
            for column in ("reward", "entropy", "tokens"):
                code = SORT.replace("NAME", column)
                found[f"sort by {column}, s"] = (clock.of(lambda of=code: browser.js(of) / 1000, 1), 1.0)
            for where in ("reward<0.001", "gap_max>0.999 clip_frac<0.5", "state=filtered", "overlong"):
                path = "rows?limit=100&where=" + quote(where)
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


def rows_shown(browser: Any) -> float:
    """Seconds from the begin of the navigation to the frame with the rows of all steps, which follow the curves."""
    look = "const look = () => below.querySelector('tbody tr') ? done() : setTimeout(look, 5); look();"
    browser.js(f"new Promise(done => {{ {look} }}).then(() => {PAINTED})")
    return browser.js("performance.now() / 1000")


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
