"""How is the rollout record written? By a thread that the run never waits for, into a folder of bounded size."""

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as pq

from rl.episodes.seen import Seen
from trainer.record import manifest
from trainer.record.manifest import Entry
from trainer.record.table import BITS, LISTS, SCALARS, Told, table_of

pc: Any = compute
"""pyarrow states no types of its functions."""
WAITING = 4
"""Steps that may wait for the disk. A further one is left out, and counted."""
CLOSE_S = 10.0
"""Seconds in which the last steps must be written when a run ends."""


class Writer:
    """Writes steps in the order in which they are given."""

    def __init__(
        self, folder: Path, *, keep: str, most_bytes: float, after: int, alerts: Callable[[], set[int]]
    ) -> None:
        """`keep` is all or some; the run continues `after` this step; `alerts` names the steps that stay whole."""
        self.folder, self.keep, self.most_bytes, self.after, self.alerts = folder, keep, most_bytes, after, alerts
        self.problem = ""
        """What the run must report; it takes it away."""
        self.left_out = 0
        self._waiting: queue.Queue[tuple[int, list[Told], list[Seen]] | Callable[[Path], None] | None] = queue.Queue(
            WAITING
        )
        self._thread = threading.Thread(target=self._work, name="rollout record", daemon=True)
        self._thread.start()

    def put(self, step: int, told: list[Told], seen: list[Seen]) -> None:
        """Give the rows of a step. Never waits."""
        self._put((step, told, seen))

    def also(self, write: Callable[[Path], None]) -> None:
        """Let the thread write something else into the folder."""
        self._put(write)

    def _put(self, job: Any) -> None:
        try:
            self._waiting.put_nowait(job)
        except queue.Full:
            self.left_out += 1
            self.problem = f"the disk takes longer than the steps: {self.left_out} steps are left out so far"

    def close(self) -> None:
        """Write what waits, for at most CLOSE_S seconds."""
        with suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_S / 2)
        self._thread.join(CLOSE_S / 2)

    def _work(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.after:
                manifest.add(self.folder, {"after": self.after})
        except OSError as error:
            self.problem = str(error)
        while (job := self._waiting.get()) is not None:
            try:
                if callable(job):
                    job(self.folder)
                else:
                    step, told, seen = job
                    self._write(step, table_of(step, told, seen), "all")
                    self._make_room(step)
            except (OSError, pa.ArrowException) as error:
                self.problem = f"{type(error).__name__}: {error}"

    def _write(self, step: int, table: pa.Table, kept: str) -> None:
        """Write a file, then its line: what is killed between has a file without a line."""
        name = f"step-{step:06d}.{kept}.parquet"
        partial = self.folder / f".{name}"
        try:
            pq.write_table(
                table,
                partial,
                compression="zstd",
                use_dictionary=["ids", "state", "reason", "finish", "error", "parts"],
                use_byte_stream_split=[f"{name}.list.element" for name in BITS],
                write_statistics=False,
                store_schema=False,
            )
            partial.replace(self.folder / name)
        finally:
            partial.unlink(missing_ok=True)
        size, tokens = (self.folder / name).stat().st_size, int(pc.sum(pc.list_value_length(table["ids"])).as_py() or 0)
        entry = Entry(step=step, file=name, bytes=size, rows=len(table), tokens=tokens, kept=kept)
        manifest.add(self.folder, entry)

    def _make_room(self, step: int) -> None:
        """Thin the oldest steps while the folder is too full; with `some`, all but the newest. At last they go."""
        alerts, kept = self.alerts(), manifest.entries(self.folder)
        total = sum(each.bytes for each in kept.values())
        for old in [e for e in kept.values() if e.kept == "all" and e.step < step and e.step not in alerts]:
            if self.keep == "all" and total <= self.most_bytes:
                return
            self._write(old.step, thinned(pq.read_table(self.folder / old.file), old.step), "some")
            (self.folder / old.file).unlink()
            total += manifest.entries(self.folder)[old.step].bytes - old.bytes
        for old in [e for e in manifest.entries(self.folder).values() if e.step < step]:
            if total <= self.most_bytes:
                return
            manifest.add(self.folder, {"gone": old.step})
            (self.folder / old.file).unlink()
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


def scalars(file: Path) -> pa.Table:
    """The rows of a file without their tokens."""
    return pq.read_table(file, columns=list(SCALARS), memory_map=True)


def tokens(file: Path, place: int) -> dict[str, Any]:
    """The tokens of one row of a file."""
    return pq.ParquetFile(file).read(columns=list(LISTS)).slice(place, 1).to_pylist()[0]
