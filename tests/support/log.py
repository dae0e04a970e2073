"""A tracker that remembers the rows it got."""

from rl.protocols import Tracker


class Log(Tracker):
    """`rows` is one dictionary per step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.rows.append({"step": step, **metrics})
