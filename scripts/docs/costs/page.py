"""What does the page of one group cost? First paint, a hover, one sequence, bytes, and requests to other hosts."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from costs.clock import FIRST, Clock, Figures, first_paint, painted, viewing

HOVER = """window.hovers = []; addEventListener('mouseover', e => { if (e.target.s) requestAnimationFrame(() =>
  setTimeout(() => hovers.push(performance.now() - e.timeStamp), 0)); }, true); undefined"""


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
            found["a new step of a live run is on the page, s, longest of 5"] = ((max(followed(browser, run)),), 2.0)
            complaints = browser.complaints()
        own = (url, (folder / "long.html").as_uri(), "about:", "data:")
        others = [asked for asked in browser.requests() if not asked.startswith(own)]
        found["requests to other hosts"] = ((len(others),), 0)
        found["errors of scripts and of the policy"] = ((len(complaints),), 0)
    finally:
        browser.close()
    return found


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


def followed(browser: Any, run: Path) -> list[float]:
    """Seconds from the end of the writing of a step to the page that shows it."""
    from planted_run import row, write
    from trainer.record.table import Told

    found = []
    browser.go("#/run")
    browser.wait("pulse !== ''")
    for step in range(2, 7):
        write(run, {step: ([Told(trajectory=row())], [])})
        began = time.perf_counter()
        browser.wait(f"document.querySelector('.facts').innerText.includes('steps recorded\\n{step}')")
        found.append(time.perf_counter() - began)
    return found


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
