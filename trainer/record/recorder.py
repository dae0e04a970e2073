"""How do the record and the timeline hear what happens? From the loop, the learner and the engines of a run."""

import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rl.config import Config
from rl.episodes.seen import Seen
from rl.protocols import Learner, SyncReport
from rl.types import Batch, Trajectory
from trainer.cluster.remote import RemoteLearner
from trainer.record import vocabulary
from trainer.record.table import Told, untold, worst_gaps
from trainer.record.timeline import NAME, Timeline, add_lines
from trainer.record.writer import Writer

T = TypeVar("T")
FLUSH = 500
"""Events after which the timeline is written, also within a step."""


class RunRecord:
    """Of one run. Its methods never wait for a disk, and raise nothing."""

    def __init__(
        self,
        run: Path,
        config: Config,
        *,
        tokenizer: Any,
        after: int,
        alert: Callable[[int, str, str], None],
        alerts: list[dict[str, Any]],
    ) -> None:
        """`after` is the step at which the run continues; `alert` reports the first thing that cannot be written; the
        steps of `alerts`, which grows, stay whole."""
        tracking = config.tracking
        self.on, self.step, self.alert, self.reported = tracking.rollouts != "off", after, alert, False
        self.timeline = Timeline()
        self.seen: list[Seen] = []
        """What the learner saw in the step that is not written yet."""
        self.left: list[Told] = []
        """Rows that are not trained on, since the last step."""
        self.moves: dict[int, list[tuple[str, int]]] = {}
        """The states of each group so far, and since when, in microseconds."""
        self.times: dict[int, tuple[float, float]] = {}
        self.free = time.time()
        """When the run last began to wait for samples."""
        most = tracking.rollouts_gib * 2**30
        self.writer = Writer(
            run / "rollouts",
            keep=tracking.rollouts,
            most_bytes=most,
            after=after,
            alerts=lambda: {alert["step"] for alert in [*alerts]},
        )
        if self.on:
            self.writer.put(lambda folder: vocabulary.save(tokenizer, folder))

    def moved(self, ordinal: int, state: str) -> None:
        """A group has a new state."""
        now = time.time()
        moves = self.moves.setdefault(ordinal, [])
        moves.append((state, round(now * 1e6)))
        if state == "ready" or "(" in state:
            sampled = [at for name, at in moves if name == "sampling"]
            self.times[ordinal] = (sampled[0] if sampled else moves[0][1]) / 1e6, now
        if state == "trained" or "(" in state:
            args = {"end": state, "moves": self.moves.pop(ordinal)[:-1]}
            self.timeline.span("groups", 0, f"group {ordinal}", moves[0][1] / 1e6, now, **args)
            self._flush(FLUSH)

    def ended(self, ordinal: int, end: str, prompt: list[int], rows: list[Trajectory], error: str) -> None:
        """A group is not trained on."""
        began, ended = self.times.pop(ordinal, (time.time(), time.time()))
        for row in rows or [untold(ordinal, prompt)]:
            self.left.append(Told(trajectory=row, end=end, error=error, began=began, ended=ended))

    def trained(self, step: int, rows: list[Trajectory]) -> list[float]:
        """A step is done. Returns the largest gap of each row in nats, and nothing where the learner saw none."""
        if step < 0:
            return []  # they are not finite, and `ended` has them
        times = {group: self.times.pop(group, (math.nan, math.nan)) for group in {row.group for row in rows}}
        told = [Told(trajectory=row, began=times[row.group][0], ended=times[row.group][1]) for row in rows]
        left, self.left, seen, self.seen, self.step = self.left, [], self.seen, [], step
        if self.on and not self.writer.put((step, told + left, seen)):
            self.writer.problem = f"the disk takes longer than the steps; step {step} is left out, and others may be"
        self.free = time.time()
        self._flush(0)
        return worst_gaps(rows, seen) if seen else []

    def called(self, engine: int, samples: int, began: float) -> None:
        """A call of an engine has ended."""
        self.timeline.span("engine", engine, f"{samples} samples", began, time.time())

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """What the run itself does."""
        began = time.time()
        try:
            yield
        finally:
            self.timeline.span("run", 0, name, began, time.time())
            self.free = time.time()

    def timed(self, name: str, due: Awaitable[T] | None) -> Coroutine[Any, Any, T] | None:
        """The same work, with its time; None where there is none."""

        async def work(due: Awaitable[T]) -> T:
            with self.during(name):
                return await due

        return None if due is None else work(due)

    def close(self) -> None:
        """Write what is left; a run that fails between two steps has its last groups as one more step."""
        if self.on and self.left:
            self.writer.put((self.step + 1, self.left, []))
        self._flush(0)
        self.writer.close()

    def _flush(self, least: int) -> None:
        if len(self.timeline.lines) > least:
            lines = self.timeline.take()
            if not self.writer.put(lambda folder: add_lines(folder.parent / NAME, "".join(lines))):
                self.timeline.lines = lines
        problem, self.writer.problem = self.writer.problem, ""
        if problem and not self.reported:
            self.reported = True
            self.alert(self.step, "rollouts cannot be recorded", f"{problem}. Training continues.")


class Recorded:
    """`rl.protocols.Learner` that tells a record what it learned, and when."""

    def __init__(self, learner: Learner, ranks: RemoteLearner, record: RunRecord) -> None:
        """`ranks` are those below `learner`."""
        self.learner, self.ranks, self.record = learner, ranks, record

    async def step(self, batch: Batch) -> dict[str, float]:
        """Train, and take what the passes gave."""
        record, began = self.record, time.time()
        record.timeline.span("run", 0, "wait for samples", record.free, began)
        with record.during(f"learn step {self.ranks.version + 1}"):
            metrics = await self.learner.step(batch)
        for rank, (seen, spans) in enumerate(await self.ranks.told()):
            record.seen += [seen] if seen else []
            for name, start, end in spans:
                record.timeline.span("learner rank", rank, name, start, end)
        return metrics

    async def publish(self, version: int) -> SyncReport:
        """Publish."""
        known, began = len(self.ranks.fleet.causes), time.time()
        report = await self.learner.publish(version)
        more = {"pause_s": round(report.pause_seconds, 4), "failed": report.failed}
        self.record.timeline.span("run", 0, f"update to v{version}", began, time.time(), **more)
        for cause in self.ranks.fleet.causes[known:]:
            self.record.timeline.mark("run", 0, cause)
        return report
