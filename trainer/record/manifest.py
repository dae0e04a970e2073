"""Which files of rollouts/ hold which step? Lines that are only added: whatever is killed, the rest can be read."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.record.lines import add_lines, read_lines

NAME = "manifest.jsonl"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One file of one step."""

    step: int
    file: str
    bytes: int
    rows: int
    tokens: int
    kept: str
    """all, or some: what `thinned` left."""


def entries(folder: Path) -> dict[int, Entry]:
    """The newest whole file of each step, in their order. A last incomplete line, and files without a line or with
    another size, are not there yet."""
    found: dict[int, Entry] = {}
    for row in read_lines(folder / NAME):
        if "after" in row:
            found = {step: each for step, each in found.items() if step <= row["after"]}
        elif "gone" in row:
            found.pop(row["gone"], None)
        else:
            found[row["step"]] = Entry(**row)
    return {step: each for step, each in sorted(found.items()) if _whole(folder / each.file, each.bytes)}


def add(folder: Path, line: Entry | dict[str, int]) -> None:
    """Add a line: a file, `{"gone": step}`, or `{"after": step}` where a run was resumed. Raises OSError."""
    row = asdict(line) if isinstance(line, Entry) else line
    add_lines(folder / NAME, json.dumps(row) + "\n")


def _whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
