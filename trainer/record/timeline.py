"""When did everything happen? Spans of engines, groups, learner ranks and the run, as Chrome trace events."""

import json
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainer.runs.reading import Lines

LANES = {"run": 1, "engine": 2, "groups": 3, "learner rank": 4}
"""Processes of the trace. A lane is a thread: a place of an engine or of the groups at the same time, or a rank."""
SLOTS = 1000
"""Threads of each engine."""
NAME = "timeline.jsonl"


class Timeline:
    """Events that wait to be written. Times are seconds since 1970."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.busy: dict[tuple[str, int], list[float]] = {}
        """Until when each slot of a lane is taken."""

    def span(self, lane: str, of: int, name: str, began: float, ended: float, **more: Any) -> None:
        """What took from `began` to `ended`; spans of one engine, or of groups, may overlap."""
        slot = 0
        if lane in ("engine", "groups"):
            taken = self.busy.setdefault((lane, of), [])
            free = (i for i, until in enumerate(taken) if until <= began)
            slot = next(free, len(taken))
            taken[slot : slot + 1] = [ended]
        self._add(name, "X", lane, of * SLOTS + slot, began, dur=round((ended - began) * 1e6), args=more)

    def mark(self, lane: str, of: int, name: str) -> None:
        """What happened just now."""
        self._add(name, "i", lane, of * SLOTS, time.time(), s="p")

    def _add(self, name: str, kind: str, lane: str, thread: int, at: float, **more: Any) -> None:
        event = {"name": name, "ph": kind, "pid": LANES[lane], "tid": thread, "ts": round(at * 1e6), **more}
        self.lines.append(json.dumps(event) + "\n")

    def take(self) -> list[str]:
        """The lines since the last call."""
        lines, self.lines = self.lines, []
        return lines


def add_lines(path: Path, text: str) -> None:
    """Add lines, on a line of their own also where a killed writer left one incomplete. Raises OSError."""
    with path.open("ab+") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        whole = file.read(1) in (b"", b"\n")
        file.write((b"" if whole else b"\n") + text.encode())


def read(run: Path, most: int = 60_000) -> list[dict[str, Any]]:
    """The last events of a run, without a last incomplete line."""
    lines = Lines(run / NAME)
    lines.more()
    return sorted(lines.rows[-most:], key=lambda event: event["ts"])


def trace(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The file that Perfetto and chrome://tracing open: with names of the lanes, and how deep the queues were."""
    events = list(events)
    threads = {(event["pid"], event["tid"]) for event in events}
    names = {number: lane for lane, number in LANES.items()}

    def named(kind: str, pid: int, name: str, **more: int) -> dict[str, Any]:
        return {"name": kind, "ph": "M", "pid": pid, "args": {"name": name}, **more}

    made = [named("process_name", pid, names[pid]) for pid in sorted({pid for pid, _ in threads})]
    made += [named("thread_name", pid, f"{names[pid]} {tid // SLOTS}", tid=tid) for pid, tid in sorted(threads)]
    made += [{"name": "groups", "ph": "C", "pid": LANES["run"], "ts": at, "args": n} for at, n in queues(events)]
    return {"traceEvents": made + events, "displayTimeUnit": "ms"}


def queues(events: Iterable[dict[str, Any]]) -> list[tuple[int, dict[str, int]]]:
    """How many groups were sampled, scored and ready, after each change: microseconds, and counts."""
    changes: list[tuple[int, str, int]] = []
    for event in events:
        if event["pid"] == LANES["groups"] and event["ph"] == "X":
            moves = [*event["args"]["moves"], ["end", event["ts"] + event["dur"]]]
            for (state, at), (_, until) in pairwise(moves):
                changes += [(at, state, 1), (until, state, -1)]
    depths = dict.fromkeys(("sampling", "scoring", "ready"), 0)
    found: list[tuple[int, dict[str, int]]] = []
    for at, state, by in sorted(changes):
        if state in depths:
            depths[state] += by
            found.append((at, dict(depths)))
    return found
