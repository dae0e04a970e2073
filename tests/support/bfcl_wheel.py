"""Where is the wheel of BFCL: installed, at UNISON_BFCL (a wheel or a folder), or in the package registry?"""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes" / "environments"
WHEEL = "bfcl-eval==2026.3.23"


def bfcl_path(folder: Path) -> list[str]:
    """What must be on the path for `import bfcl_tasks`; skips the test where the wheel cannot be had."""
    if importlib.util.find_spec("bfcl_eval"):
        return [str(RECIPES)]
    given = os.environ.get("UNISON_BFCL")
    if given and Path(given).is_dir():
        return [str(RECIPES), given]
    found = [Path(given)] if given else _downloaded(folder)
    with zipfile.ZipFile(found[0]) as wheel:
        wheel.extractall(folder / "unpacked")
    return [str(RECIPES), str(folder / "unpacked")]


def _downloaded(folder: Path) -> list[Path]:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), WHEEL]
    got = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = sorted(folder.glob("bfcl_eval-*.whl"))
    if not found:
        pytest.skip(f"{WHEEL} is not installed, and cannot be downloaded: {got.stderr.strip()[-300:]}")
    return found
