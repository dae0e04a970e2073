"""The weight channel between CPU processes: numbered buckets in shared memory or over gloo, checked before use.

Sender and receivers each hold the *image*: every tensor at its place in one flat buffer. On one host it is one file in
shared memory, so the sender's copy into it is the whole transfer; elsewhere each side has its own, and the sender
sends what changed (see `rollout.weights.sparse`) where that is shorter. Headers, sums and verdicts travel over gloo.
"""

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

from rl.protocols import UpdateFailed
from rollout.weights.buckets import BUCKET_BYTES, Bucket, Meta, buckets

_DENSE, _SPARSE, _END = 0, 1, -1
_FIELDS = 5
_REPORT_BYTES = 1024
SHARED = Path("/dev/shm")


@dataclass(frozen=True)
class Layout:
    """What both sides must agree on: the tensors in the order of travel, and where the image is, if it is shared."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    bucket_bytes: int
    segment: str = ""
    host: str = ""

    @classmethod
    def of(cls, metas: Iterable[Any]) -> "Layout":
        """Of the learner's `TensorMeta`s."""
        metas = list(metas)
        return cls([m.name for m in metas], [m.dtype for m in metas], [list(m.shape) for m in metas], BUCKET_BYTES)

    def buckets(self) -> list[tuple[Bucket, int]]:
        """The buckets with their offsets in the image."""
        dtypes = [getattr(torch, name) for name in self.dtype_names]
        metas: list[Meta] = list(zip(self.names, dtypes, map(tuple, self.shapes), strict=True))
        cut, offset = [], 0
        for bucket in buckets(metas, self.bucket_bytes):
            cut.append((bucket, offset))
            offset += bucket[1]
        return cut


def join(address: str, port: int, rank: int, world_size: int, timeout_s: float) -> ProcessGroupGloo:
    """A gloo group beside the process's default one; rank 0 is where the others meet. Every wait in it is bounded."""
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout)
    return ProcessGroupGloo(PrefixStore("weights", store), rank, world_size, timeout)


def broadcast(group: ProcessGroupGloo, tensor: Tensor) -> Tensor:
    """From rank 0 to all; returns the tensor, which the others must have made."""
    with _errors_of_gloo():
        _begin(group, tensor).wait()
    return tensor


def _begin(group: ProcessGroupGloo, tensor: Tensor) -> Any:
    """A broadcast under way; it keeps the tensor."""
    options = BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    return group.broadcast([tensor], options)


@contextmanager
def _errors_of_gloo() -> Iterator[None]:
    """A peer that is gone or late, as an UpdateFailed in gloo's own words."""
    try:
        yield
    except RuntimeError as error:
        raise UpdateFailed(f"the weight channel was cut off ({str(error).splitlines()[0]})") from None


def gather_words(group: ProcessGroupGloo, words: str) -> list[str]:
    """What each rank has to say, in the order of the ranks."""
    mine = torch.zeros(_REPORT_BYTES, dtype=torch.uint8)
    text = words.encode()[:_REPORT_BYTES]
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else mine[:0]
    all_of_them = [torch.zeros_like(mine) for _ in range(group.size())]
    with _errors_of_gloo():
        group.allgather([all_of_them], [mine]).wait()
    return [bytes(t.tolist()).rstrip(b"\0").decode(errors="replace") for t in all_of_them]


def this_host() -> str:
    """Equal in all processes that can share memory: same machine, same /dev/shm (a container may have its own)."""
    if not SHARED.is_dir():
        return ""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{SHARED.stat().st_dev}"


def reserve(nbytes: int) -> str:
    """A file of that size in shared memory, or "" where there is no room: a container often has 64 MB."""
    if not SHARED.is_dir():
        return ""
    path = SHARED / f"unison-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
    except OSError:
        path.unlink(missing_ok=True)
        return ""
    return str(path)


def _map(path: str, nbytes: int) -> Tensor:
    return torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)


def _sum(buffer: Tensor) -> int:
    return int(buffer.view(torch.int64).sum())
