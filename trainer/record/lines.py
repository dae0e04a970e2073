"""How do files of JSON lines survive a kill? Lines are only added, and what is no whole line is not read."""

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without what a killed writer left incomplete; none where there is no file."""
    found: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def add_lines(path: Path, text: str) -> None:
    """Add lines, on a line of their own also where a killed writer left one incomplete. Raises OSError."""
    with path.open("ab+") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        whole = file.read(1) in (b"", b"\n")
        file.write((b"" if whole else b"\n") + text.encode())
