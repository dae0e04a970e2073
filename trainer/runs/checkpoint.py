"""Is this checkpoint complete? A folder appears at once or not at all, with a digest of every file."""

import fcntl
import hashlib
import json
import os
import shutil
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

SCHEMA = 1
MANIFEST, STATE = "manifest.json", "state.json"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file, the problem and the remedy."""


class Damaged(CheckpointError):
    """A checkpoint was complete once and is damaged now; an older one may be used instead."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose every byte was verified."""

    folder: Path
    state: dict[str, Any]
    damaged: dict[Path, str] = field(default_factory=dict)
    """Newer checkpoints that were skipped, and why."""


def draft(run: Path, step: int) -> Path:
    """Make an empty folder next to the checkpoints, to be filled and then committed."""
    # A killed writer may leave a process that still writes: its folder is never used again.
    folder = run / "checkpoints" / f".step-{step:06d}.{uuid.uuid4().hex[:8]}.partial"
    (folder / "learner").mkdir(parents=True)
    return folder


def commit(folder: Path, step: int, state: dict[str, Any], *, keep_last: int) -> Path:
    """Turn a filled draft into the checkpoint of a step, then delete all but the newest `keep_last`.

    Raises OSError when the learner's files are missing.
    """
    if not any((folder / "learner").iterdir()):
        raise OSError(
            f"the ranks wrote into {folder}, and the driver sees nothing there: on a cluster, output_dir must be on a "
            "file system that all nodes share"
        )
    _write(folder / STATE, state)
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    with ThreadPoolExecutor() as pool:
        files = dict(zip((p.relative_to(folder).as_posix() for p in paths), pool.map(_flushed, paths), strict=True))
    _write(folder / MANIFEST, _sealed({"schema": SCHEMA, "name": state["name"], "step": step, "files": files}))
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        _sync_folder(path)
    final = folder.with_name(f"step-{step:06d}")
    if final.exists():
        discard(final)
    os.rename(folder, final)
    _sync_folder(final.parent)
    for old in finished(final.parent)[:-keep_last]:
        discard(old)
    return final


def latest(run: Path) -> Checkpoint:
    """The newest complete checkpoint of a run's folder. Damaged ones are skipped, and named in `damaged`.

    Raises CheckpointError when there is none, and when the newest has a later schema than this code reads.
    """
    if not run.is_dir():
        raise CheckpointError(
            f"there is no run in {run.absolute()}: give the folder of a run, such as runs/quickstart; one that was "
            "moved is resumed from where it is now"
        )
    if (run / MANIFEST).exists():
        raise CheckpointError(f"{run} is a checkpoint: give the folder of its run, {run.absolute().parents[1]}")
    damaged: dict[Path, str] = {}
    older = finished(run / "checkpoints")
    while older:
        folder = older.pop()
        try:
            return Checkpoint(folder=folder, state=verify(folder), damaged=damaged)
        except Damaged as error:
            damaged[folder] = str(error)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{_last_good(older)}") from None
    if damaged:
        raise CheckpointError("\n".join([*damaged.values(), f"no checkpoint in {run} is whole: start the run again"]))
    raise CheckpointError(f"{run} holds no checkpoint yet: start the run again, with --save-every below its --steps")


def verify(folder: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its manifest, and return its state. Raises CheckpointError."""
    manifest = _read(folder / MANIFEST)
    if manifest.get("schema", 0) > SCHEMA:
        raise CheckpointError(
            f"{folder / MANIFEST} was written by a newer unison (schema {manifest['schema']}, and this one reads up to "
            f"{SCHEMA}): update unison to resume from it"
        )
    if manifest != _sealed({k: v for k, v in manifest.items() if k != "seal"}):
        raise Damaged(f"{folder / MANIFEST} is damaged: its seal does not match its content")
    for name, wanted in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        if path.stat().st_size != wanted["bytes"]:
            raise Damaged(f"{path} is torn: it has {path.stat().st_size} of {wanted['bytes']} bytes")
        with path.open("rb") as file:
            if hashlib.file_digest(file, _hash).hexdigest() != wanted["blake2b"]:
                raise Damaged(f"{path} is damaged: its digest is not the one in {MANIFEST}")
    return _read(folder / STATE)


def sweep(run: Path) -> None:
    """Delete the drafts of killed writers."""
    for leftover in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(leftover)


def lock(run: Path) -> TextIO:
    """Lock a run's folder until the returned file is closed or the process ends."""
    file = (run / "run.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise CheckpointError(f"another process runs in {run} now: two would overwrite each other") from None
    except OSError as error:
        warnings.warn(
            f"{run} is not protected from other processes: its file system has no locks ({error})", stacklevel=2
        )
    return file


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, for inspection; nothing deletes it."""
    os.rename(folder, folder.with_name(f"damaged-{folder.name}-{uuid.uuid4().hex[:8]}"))


def _last_good(older: list[Path]) -> str:
    for folder in reversed(older):
        try:
            verify(folder)
        except CheckpointError:
            continue
        return f". The last good one is {folder}: it is used when the newer ones are moved away"
    return ""


def finished(folder: Path) -> list[Path]:
    """Finished checkpoints by step, the newest last."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def discard(folder: Path) -> None:
    """Delete a folder that others rely on."""
    # Renamed first: an interrupted deletion must not leave half a checkpoint that looks complete.
    hidden = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def _flushed(path: Path) -> dict[str, Any]:
    """A file's size and digest, once it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "blake2b": hashlib.file_digest(file, _hash).hexdigest()}


def _hash() -> Any:
    return hashlib.blake2b(digest_size=16)


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    digest = _hash()
    digest.update(json.dumps(manifest, sort_keys=True).encode())
    return manifest | {"seal": digest.hexdigest()}


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except ValueError as error:
        raise Damaged(f"{path} is torn or damaged: it is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise Damaged(f"{path} is damaged: it holds no object")
    return value


def _write(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
