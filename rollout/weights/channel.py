"""The weight channel between CPU processes: numbered buckets in shared memory or over gloo, checked before use.

The sender and each receiver hold the *image*: every tensor at its place in one flat buffer. On one host the image is
one file in shared memory, so the sender's copy into it is the whole transfer. Between hosts each side has its own
image, and the sender sends the changes (see `rollout.weights.sparse`) where they are shorter. Headers, checksums and
the receivers' reports travel over gloo.
"""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from socket import AF_INET, AF_INET6, create_server, socket
from typing import Any

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore  # pyright: ignore[reportPrivateImportUsage]  (documented there)

from rl.protocols import UpdateFailed
from rl.weights import TensorMeta
from rollout.weights.buckets import BUCKET_BYTES, Bucket, Meta, buckets

HEADER_FIELDS = 5
"""Of the header that announces a bucket: version, index, base version (-1: none), encoding, payload size in bytes."""
DENSE, SPARSE = 0, 1
"""Encodings of a payload: all values, or the changes from the base version."""
END_OF_UPDATE = -1
"""The index in the last header of an update, which has no payload."""
REPORT_BYTES = 1024
SHARED = Path("/dev/shm")


@dataclass(frozen=True)
class Layout:
    """What both sides must agree on: the tensors in the order in which they are sent, and the shared image, if any."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    bucket_bytes: int
    segment: str = ""
    """The image's file in shared memory."""
    host: str = ""
    """The sender's `this_host`."""

    @classmethod
    def of(cls, metas: Iterable[TensorMeta]) -> "Layout":
        """The layout of the learner's tensors, without shared memory."""
        metas = list(metas)
        return cls([m.name for m in metas], [m.dtype for m in metas], [list(m.shape) for m in metas], BUCKET_BYTES)

    def buckets(self) -> list[tuple[Bucket, int]]:
        """The buckets with their offsets in the image, in bytes."""
        dtypes = [getattr(torch, name) for name in self.dtype_names]
        metas: list[Meta] = list(zip(self.names, dtypes, map(tuple, self.shapes), strict=True))
        placed, offset = [], 0
        for bucket in buckets(metas, self.bucket_bytes):
            placed.append((bucket, offset))
            offset += bucket[1]
        return placed


def free_port(address: str) -> socket:
    """Listen on a port of the system's choice, in the family of an address of this node."""
    return create_server(("", 0), family=AF_INET6 if ":" in address else AF_INET)


def meeting_place(
    address: str, world_size: int, timeout_s: float, listen: Callable[[str], socket] = free_port
) -> TCPStore:
    """Where the ranks of a new group meet: where this process, which must be rank 0, listens. Returns at once."""
    listener, timeout = listen(address), timedelta(seconds=timeout_s)
    port, there = listener.getsockname()[1], listener.detach()
    return TCPStore(
        address, port, world_size, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=there
    )


def join(address: str, port: int, rank: int, world_size: int, timeout_s: float) -> ProcessGroupGloo:
    """Join rank 0 at its meeting place. Waits for at most `timeout_s`."""
    store = TCPStore(address, port, world_size, is_master=False, timeout=timedelta(seconds=timeout_s))
    return group_of(store, rank, world_size, timeout_s)


def group_of(store: TCPStore, rank: int, world_size: int, timeout_s: float) -> ProcessGroupGloo:
    """A gloo group in addition to the process's default group. Every wait is bounded."""
    return ProcessGroupGloo(PrefixStore("weights", store), rank, world_size, timedelta(seconds=timeout_s))


def broadcast(group: ProcessGroupGloo, tensor: Tensor) -> Tensor:
    """Broadcast from rank 0 to all. Returns the tensor, which the other ranks must have allocated."""
    with gloo_errors():
        begin_broadcast(group, tensor).wait()
    return tensor


def begin_broadcast(group: ProcessGroupGloo, tensor: Tensor) -> Any:
    """Start a broadcast from rank 0. The returned work object keeps the tensor alive and has `wait`."""
    options = BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    untyped: Any = group  # torch's stub of gloo lacks the collectives
    return untyped.broadcast([tensor], options)


@contextmanager
def gloo_errors() -> Iterator[None]:
    """Raise gloo's error about a lost or late peer as UpdateFailed, with gloo's own text."""
    try:
        yield
    except RuntimeError as error:
        raise UpdateFailed(f"the weight channel's connection failed ({str(error).splitlines()[0]})") from None


def gather_texts(group: ProcessGroupGloo, text: str) -> list[str]:
    """Exchange one text per rank (cut to `REPORT_BYTES`); returns all of them in the order of the ranks."""
    mine = torch.zeros(REPORT_BYTES, dtype=torch.uint8)
    encoded = text.encode()[:REPORT_BYTES]
    mine[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8) if encoded else mine[:0]
    gathered = [torch.zeros_like(mine) for _ in range(group.size())]
    untyped: Any = group
    with gloo_errors():
        untyped.allgather([gathered], [mine]).wait()
    return [bytes(t.tolist()).rstrip(b"\0").decode(errors="replace") for t in gathered]


def this_host() -> str:
    """Equal in all processes that can share memory: same machine, same /dev/shm (a container may have its own)."""
    if not SHARED.is_dir():
        return ""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{SHARED.stat().st_dev}"


def reserve(nbytes: int) -> str:
    """Create a file of `nbytes` in shared memory. Returns "" if it does not fit: a container often has 64 MB."""
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


def map_shared(path: str, nbytes: int) -> Tensor:
    """A flat uint8 tensor over a file in shared memory."""
    return torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)


def checksum(buffer: Tensor) -> int:
    """The wrapping sum of a bucket's bytes, read as 64-bit integers."""
    return int(buffer.view(torch.int64).sum())
