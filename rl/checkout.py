"""Do the three packages come from one checkout? Their names are generic, so another `trainer` may be on the path."""

import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rl", "rollout", "trainer")
INSTALLED = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
"""Folders of installed code, which has a version."""


def verify() -> None:
    """Raise ImportError when `rollout` or `trainer` would be imported from another checkout than `rl`."""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != ROOT / name:
            raise ImportError(
                f"`import {name}` would load {found or 'nothing'}, but this is unison-rl in {ROOT}. Another package "
                f"named {name!r} comes first on sys.path: take it off PYTHONPATH, or run from a clean virtual "
                f"environment with `pip install -e {ROOT}`."
            )


def digest() -> str:
    """SHA-256 over the sources of the three packages: equal on every node when they run the same code."""
    h = hashlib.sha256()
    for path in sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py")):
        h.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return h.hexdigest()[:16]


def versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found: dict[str, str] = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def is_installed(file: Path) -> bool:
    """Whether a file is of Python's own library, or of a package that was installed."""
    return "site-packages" in file.parts or any(folder in file.parents for folder in INSTALLED)
