"""How long does a view of the page take? By the page's own clock, and in CPU seconds of browser and server."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PAINTED = "new Promise(done => requestAnimationFrame(() => setTimeout(() => done(performance.now()), 0)))"
FIRST = """new MutationObserver(() => { if (document.body?.dataset.shown == null || window.first) return;
  window.first = 1; requestAnimationFrame(() => setTimeout(() => { window.first = performance.now(); }, 0)); })
  .observe(document, { subtree: true, childList: true, attributes: true });"""
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
