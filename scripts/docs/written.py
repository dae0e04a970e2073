"""A page that a script writes: write it, or check that it is what the script would write."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def write_or_check(page: Path, wanted: str, flags: list[str]) -> int:
    """Exit status: with `--check` 1 when the page is out of date, else 0 after writing it."""
    if "--check" not in flags:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(wanted)
        return 0
    fresh = page.exists() and page.read_text() == wanted
    print(f"{page.relative_to(ROOT)} is {'up to date' if fresh else f'out of date: run python {sys.argv[0]}'}")
    return 0 if fresh else 1
