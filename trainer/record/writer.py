"""How is the rollout record written? By a thread that the run never waits for, into a folder of bounded size."""

import queue
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as pq

from rl.episodes.seen import Seen
from trainer.record.table import BITS, LISTS, Told, table_of

pc: Any = compute
"""pyarrow states no types of its functions."""
Step = tuple[int, list[Told], list[Seen]]
NAME = re.compile(r"step-(\d+)\.(all|some)\.parquet")
WAITING = 4
"""Steps that may wait for the disk. A further one is left out."""
CLOSE_S = 10.0
"""Seconds in which the last steps must be written when a run ends."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The file of one step."""

    step: int
    file: str
    bytes: int
    kept: str
    """all, or some: what `thinned` left."""


def entries(folder: Path) -> dict[int, Entry]:
    """What a folder holds, by step and in their order: a file gets its name when it is whole."""
    found: dict[int, Entry] = {}
    for file in sorted(folder.glob("step-*.parquet")):
        if match := NAME.fullmatch(file.name):
            with suppress(OSError):  # its run has thinned it meanwhile
                step, size = int(match[1]), file.stat().st_size
                found[step] = Entry(step=step, file=file.name, bytes=size, kept=match[2])
    return dict(sorted(found.items()))


class Writer:
    """Writes steps in the order in which they are given."""

    def __init__(
        self, folder: Path, *, keep: str, most_bytes: float, after: int, alerts: Callable[[], set[int]]
    ) -> None:
        """`keep` is all or some; the run continues `after` this step; `alerts` names the steps that stay whole."""
        self.folder, self.keep, self.most_bytes, self.after, self.alerts = folder, keep, most_bytes, after, alerts
        self.problem = ""
        """What the run must report; it takes it away."""
        self.kept: dict[int, Entry] = {}
        self._waiting: queue.Queue[Step | Callable[[Path], None] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, name="rollout record", daemon=True)
        self._thread.start()

    def put(self, job: Step | Callable[[Path], None]) -> bool:
        """Give the rows of a step, or what else writes into the folder; False if too much waits. Never waits."""
        with suppress(queue.Full):
            self._waiting.put_nowait(job)
            return True
        return False

    def close(self) -> None:
        """Write what waits, for at most CLOSE_S seconds."""
        with suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_S / 2)
        self._thread.join(CLOSE_S / 2)

    def _work(self) -> None:
        jobs = iter(self._waiting.get, None)
        for job in chain([self._begin], jobs):
            try:
                if callable(job):
                    job(self.folder)
                else:
                    step, told, seen = job
                    self._write(step, table_of(step, told, seen), "all")
                    self._make_room(step)
            except Exception as error:  # whatever is wrong with a record, it is not worth a run
                self.problem = f"{type(error).__name__}: {error}"

    def _begin(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.kept = {step: each for step, each in entries(folder).items() if step <= self.after}
        whole = {each.file for each in self.kept.values()}
        # What a kill left, and steps after the checkpoint, which are made again.
        for file in folder.glob("*step-*") if self.after else ():
            if file.name not in whole:
                file.unlink()

    def _write(self, step: int, table: pa.Table, kept: str) -> None:
        name = f"step-{step:06d}.{kept}.parquet"
        partial = self.folder / f".{name}"
        try:
            pq.write_table(
                table,
                partial,
                compression="zstd",
                use_dictionary=["ids.list.element", "state", "reason", "finish", "error", "parts"],
                use_byte_stream_split=[f"{name}.list.element" for name in BITS],
                write_statistics=False,
                store_schema=False,
            )
            partial.replace(self.folder / name)
        finally:
            partial.unlink(missing_ok=True)
        self.kept[step] = Entry(step=step, file=name, bytes=(self.folder / name).stat().st_size, kept=kept)

    def _make_room(self, step: int) -> None:
        """Thin the oldest steps while the folder is too full; with `some`, all but the newest. At last they go."""
        alerts, total = self.alerts(), sum(each.bytes for each in self.kept.values())
        for old in [e for e in self.kept.values() if e.kept == "all" and e.step < step and e.step not in alerts]:
            if self.keep == "all" and total <= self.most_bytes:
                return
            self._write(old.step, thinned(pq.read_table(self.folder / old.file), old.step), "some")
            (self.folder / old.file).unlink()
            total += self.kept[old.step].bytes - old.bytes
        for old in [e for e in self.kept.values() if e.step < step]:
            if total <= self.most_bytes:
                return
            (self.folder / old.file).unlink()
            del self.kept[old.step]
            total -= old.bytes


def thinned(table: pa.Table, seed: int) -> pa.Table:
    """Of a step: the row with the largest gap, the longest, and one trained group, drawn with a seed."""
    trained = np.unique(table.filter(pc.equal(table["state"], "trained"))["group"].to_numpy())
    chosen = np.zeros(len(table), bool)
    for name in ("gap_max", "tokens"):
        chosen[np.argmax(np.nan_to_num(table[name].to_numpy().astype(float), nan=-1.0))] = True
    if len(trained):
        chosen |= table["group"].to_numpy() == np.random.default_rng(seed).choice(trained)
    return table.filter(pa.array(chosen))


def tokens(file: Path, places: list[int]) -> list[dict[str, np.ndarray]]:
    """The tokens of some rows of a file: arrays [n] by name."""
    read = pq.ParquetFile(file).read(columns=list(LISTS)) if places else {}
    return [{name: pc.list_flatten(read[name].slice(p, 1)).to_numpy() for name in LISTS} for p in places]
