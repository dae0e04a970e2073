"""A page that a script writes: write it, or check that it is what the script would write."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def only_check(doc: str | None) -> bool:
    """Whether the command line of a script with this docstring has `--check`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    return parser.parse_args().check


def write_or_check(page: Path, wanted: str, *, check: bool) -> int:
    """Exit status: with `check` 1 when the page is out of date, else 0 after writing it."""
    if not check:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(wanted)
        return 0
    fresh = page.exists() and page.read_text() == wanted
    print(f"{page.relative_to(ROOT)} is {'up to date' if fresh else f'out of date: run python {sys.argv[0]}'}")
    return 0 if fresh else 1
