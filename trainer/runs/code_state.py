"""Which code ran? The commit of the recipe's repository, and what was changed since."""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

GIT_S = 10.0
MOST = 5_000_000
"""Characters of the changes that are kept."""


def keep_code(folder: Path) -> dict[str, Any]:
    """Write the changes into a run's folder as code.diff; returns the commit, and whether there are changes."""
    commit, patch = code_state(Path(sys.argv[0] or ".").resolve().parent)
    if patch:
        with suppress(OSError):  # a disk that is full is reported at the first row
            (folder / "code.diff").write_text(patch)
    return {"commit": commit, "changed": bool(patch)}


def code_state(place: Path) -> tuple[str, str]:
    """The commit of the repository that holds a folder, and its uncommitted changes as a patch; both empty without a
    repository, or without git."""
    commit = _git(place, "rev-parse", "HEAD").strip()
    return commit, _git(place, "diff", "HEAD", "--no-color", "--no-ext-diff")[:MOST] if commit else ""


def _git(place: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(place), *words], capture_output=True, timeout=GIT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""
