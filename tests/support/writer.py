"""A writer of checkpoints; as a program, one that is gone before its n-th operation on a file.

A program of its own, because a forked copy of a test process that has threads may wait for their locks for ever.
"""

import os
import sys
from pathlib import Path

from trainer.runs import checkpoint

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "fsync"}
KILLED = 9


def write(run: Path, step: int, *, keep_last: int = 2, name: str = "t") -> Path:
    """A checkpoint with a learner's file of its own."""
    draft = checkpoint.draft(run, step)
    (draft / "learner" / "layer-0000.safetensors").write_bytes(bytes([step % 251]) * 1000)
    (draft / "history.jsonl").write_text(f'{{"step": {step}}}\n')
    return checkpoint.commit(draft, step, {"name": name, "step": step}, keep_last=keep_last)


def die_before(moment: int) -> None:
    """End this process, with nothing flushed or closed, as it begins the operation that follows `moment` others."""
    seen = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in OPERATIONS:
            seen += 1
            if seen > moment:
                os._exit(KILLED)

    fsync = os.fsync

    def audited_fsync(descriptor: int) -> None:
        sys.audit("fsync", descriptor)
        fsync(descriptor)

    os.fsync = audited_fsync
    sys.addaudithook(count)


if __name__ == "__main__":
    run, step, moment = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    die_before(moment)
    write(run, step)
    os._exit(0)
