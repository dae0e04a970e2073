"""What is in a run's folder now? Read again and again while the run writes, or long after it has ended."""

import fcntl
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Lines:
    """A .jsonl file that grows. A last incomplete line is left for the next time; a file that was replaced, as by a
    resumed run, is read from its begin."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    _read: int = 0
    _file: int | None = None

    def more(self) -> int:
        """Read what is new; returns how many rows that are."""
        if not self.path.is_file():
            return 0
        with self.path.open("rb") as file:
            stat = self.path.stat()
            if stat.st_ino != self._file or stat.st_size < self._read:
                self.rows, self._read, self._file = [], 0, stat.st_ino
            file.seek(self._read)
            whole, _, _ = file.read().rpartition(b"\n")
        before = len(self.rows)
        for line in whole.splitlines():
            with suppress(ValueError):  # a line that a full disk has cut
                self.rows.append(json.loads(line))
        self._read += len(whole) + 1 if whole else 0
        return len(self.rows) - before


class Reading:
    """A run that is watched. `refresh` reads what is new."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where this is no run's folder."""
        self.folder = folder
        try:
            self.settings: dict[str, Any] = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} is no folder of a run ({error}): give one that holds config.json, such as runs/quickstart"
            ) from error
        self.metrics, self.alerts = Lines(folder / "metrics.jsonl"), Lines(folder / "alerts.jsonl")
        self.status, self.summary = "running", dict[str, Any]()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The steps so far, evaluations alone among them."""
        return self.metrics.rows

    @property
    def ended(self) -> bool:
        """Whether nothing writes any more."""
        return self.status != "running"

    @property
    def idle_s(self) -> float:
        """Seconds since the last row, while the run lives; 0 after its end."""
        if self.ended or not self.rows:
            return 0.0
        with suppress(OSError):
            return max(0.0, time.time() - self.metrics.path.stat().st_mtime)
        return 0.0

    def refresh(self) -> int:
        """Read what is new; returns the number of new steps."""
        # First: what a writer that has ended by now wrote last is then read below.
        self.status = "running" if _is_locked(self.folder / "run.lock") else ""
        self.alerts.more()
        new = self.metrics.more()
        if not self.status:
            self.summary = _summary(self.folder)
            self.status = str(self.summary.get("status", "killed"))
        return new


def _summary(folder: Path) -> Mapping[str, Any]:
    """What the run wrote at its end; nothing for a writer that died: its summary, if any, is that of an earlier try."""
    with suppress(OSError, ValueError):
        path, rows = folder / "summary.json", folder / "metrics.jsonl"
        if not rows.is_file() or path.stat().st_mtime >= rows.stat().st_mtime - 2.0:
            return json.loads(path.read_text())
    return {}


def _is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a run. It is tried for a moment, and shared, so that watchers do not meet."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
