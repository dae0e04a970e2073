"""How does a run write its files? JSON that every reader accepts, in a folder that no other run uses."""

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

RESERVED = 1 << 18
"""Bytes that a run keeps for its last words."""


def write_json(path: Path, value: Any) -> None:
    """Write JSON completely or not at all: a reader never sees half a file. Raises OSError, as on a full disk."""
    text = json.dumps(without_nan(value), indent=2) + "\n"
    partial = path.with_suffix(path.suffix + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


class Rows:
    """A .jsonl file that rows are appended to, and that ends with a whole row at every moment.

    A row that cannot be written, as on a full disk, waits in memory and is written before the next one.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.waiting = path, b""
        self.descriptor: int | None = None
        with suppress(OSError):  # a full disk: the first row reports it
            self._open()

    def append(self, row: dict[str, Any]) -> None:
        """Write a row at once. Raises OSError; the row is then not lost."""
        self.waiting += json.dumps(without_nan(row)).encode() + b"\n"
        self.write()

    def write(self) -> None:
        """Write what waits, as many whole rows as there is space for. Raises OSError when some must wait."""
        descriptor = self._open()
        size = os.fstat(descriptor).st_size
        data = memoryview(self.waiting)
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        except OSError:
            whole = self.waiting[: len(self.waiting) - len(data)].rfind(b"\n") + 1
            os.ftruncate(descriptor, size + whole)
            self.waiting = self.waiting[whole:]
            raise
        self.waiting = b""

    def _open(self) -> int:
        if self.descriptor is None:
            self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        return self.descriptor

    def close(self) -> None:
        """Write what waits, and close the file. Raises OSError when rows are lost."""
        try:
            self.write()
        finally:
            if self.descriptor is not None:
                os.close(self.descriptor)


class Reserve:
    """Space on the disk for the last files of a run, which other files may fill until then."""

    def __init__(self, folder: Path) -> None:
        """Raises nothing: a disk that is full already has no space to keep."""
        self.path = folder / ".reserve"
        with suppress(OSError), self.path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, RESERVED)

    def free(self) -> None:
        """Give the space to the files that are written next."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def without_nan(value: Any) -> Any:
    """The same value with None for every NaN and infinity, which JSON cannot hold."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_folder(wanted: Path) -> Path:
    """Make the wanted folder, or the first of wanted-2, wanted-3, ... that does not exist: no run overwrites another.

    Two runs that start at the same time get different folders.
    """
    number, folder = 1, wanted
    wanted.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
