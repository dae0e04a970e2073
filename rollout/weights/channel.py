"""The weight channel between CPU processes: numbered buckets in shared memory or over gloo, checked before use.

Sender and receivers each hold the *image*: every tensor at its place in one flat buffer. On one host it is one file in
shared memory, so the sender's copy into it is the whole transfer; elsewhere each side has its own, and the sender
sends what changed (see `rollout.weights.sparse`) where that is shorter. Headers, sums and verdicts travel over gloo.
"""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

from rl.protocols import UpdateFailed
from rollout.weights import sparse
from rollout.weights.buckets import BUCKET_BYTES, Bucket, Meta, buckets, pack, unpack

ANCHOR_EVERY = 50
"""Updates after which one is sent whole, whatever changed."""
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


class Outbox:
    """The sender's end."""

    def __init__(self, group: ProcessGroupGloo, layout: Layout) -> None:
        """Meets the receivers' `Inbox`; `layout.segment` names reserved memory, which belongs to no name afterwards."""
        self.group, self.cut = group, layout.buckets()
        self.nbytes = sum(bucket[1] for bucket, _ in self.cut)
        words = gather_words(group, "shared" if layout.segment else "apart")
        self.shared = all(w == "shared" for w in words)
        self.image = _map(layout.segment, self.nbytes) if self.shared else torch.zeros(self.nbytes, dtype=torch.uint8)
        self.held: int | None = None
        """Version of the image that every receiver holds; None when that is not sure."""
        self.since_anchor = 0
        self.scratch: Tensor | None = None
        self.told: list[Any] = []
        """Headers under way. In shared memory the bytes need not wait until a receiver has time to read them."""
        self.sent_bytes = 0
        """What the last update put on the wire or in shared memory."""

    def send(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Bring the receivers' images to these tensors; returns when the bytes of all are readable there."""
        base, self.held, self.sent_bytes = self.held, None, 0
        if base is None or self.since_anchor >= ANCHOR_EVERY:
            base, self.since_anchor = None, 0
        self.since_anchor += 1
        self.version = version
        if self.shared:
            # Told once all of it is there: a receiver that loads the first bucket takes the core that copies the rest.
            for bucket, offset in self.cut:
                pack(bucket, tensors, into=self.image[offset : offset + bucket[1]])
            for index in range(len(self.cut)):
                self._tell(index, None, _DENSE, torch.empty(0, dtype=torch.uint8))
            self.held, self.sent_bytes = version, self.nbytes
            return
        for index, (bucket, offset) in enumerate(self.cut):
            place = self.image[offset : offset + bucket[1]]
            if base is not None and all(meta[1].itemsize == 2 for meta, _ in bucket[0]):
                new = pack(bucket, tensors, into=self._scratch(bucket[1]))
                encoding, payload = _shorter(place, new)
                if encoding == _DENSE:
                    place.copy_(new)
                else:
                    sparse.apply(payload, place.view(torch.int16))
            else:
                encoding, payload = _DENSE, pack(bucket, tensors, into=place)
            self._tell(index, base if encoding == _SPARSE else None, encoding, payload)
            self.sent_bytes += payload.numel()
        self.held = version

    def _scratch(self, nbytes: int) -> Tensor:
        """Memory for the new values of one bucket, made once: fresh pages cost more than the copy."""
        if self.scratch is None:
            self.scratch = torch.zeros(max(bucket[1] for bucket, _ in self.cut), dtype=torch.uint8)
        return self.scratch[:nbytes]

    def settle(self) -> None:
        """Tell that this was all, with the sums of the buckets, and wait for every receiver's verdict. Raises
        UpdateFailed with theirs."""
        self._tell(_END, None, _DENSE, torch.empty(0, dtype=torch.uint8))
        with _errors_of_gloo():
            while self.told:
                self.told.pop(0).wait()
        if not self.shared:  # where both ends read the same memory, nothing can change on its way
            broadcast(self.group, torch.tensor([_sum(self.image[o : o + b[1]]) for b, o in self.cut]))
        verdicts = {f"engine worker {i}": w for i, w in enumerate(gather_words(self.group, "")[1:]) if w}
        if verdicts:
            self.held = None
            raise UpdateFailed(
                f"weight update {self.version} was not taken: "
                + "; ".join(f"{who}: {words}" for who, words in verdicts.items())
            )

    def _tell(self, index: int, base: int | None, encoding: int, payload: Tensor) -> None:
        header = torch.tensor([self.version, index, -1 if base is None else base, encoding, payload.numel()])
        if self.shared:
            with _errors_of_gloo():
                self.told.append(_begin(self.group, header))
            return
        broadcast(self.group, header)
        if payload.numel():
            broadcast(self.group, payload)


class Inbox:
    """A receiver's end."""

    def __init__(self, group: ProcessGroupGloo, layout: Layout) -> None:
        self.group, self.cut = group, layout.buckets()
        nbytes = sum(bucket[1] for bucket, _ in self.cut)
        here = bool(layout.segment) and layout.host == this_host() and os.path.exists(layout.segment)
        image = _map(layout.segment, nbytes) if here else None
        words = gather_words(group, "shared" if here else "apart")
        self.shared = all(w == "shared" for w in words)
        self.image = image if self.shared and image is not None else torch.zeros(nbytes, dtype=torch.uint8)
        self.held: int | None = None

    def receive(
        self,
        version: int,
        begin: Callable[[], object],
        take: Callable[[list[tuple[str, Tensor]]], object],
        finish: Callable[[], object],
    ) -> None:
        """Hand every bucket's tensors to `take` as they come, and tell the sender whether all is well.

        Raises UpdateFailed, after the sender was told why, when something is missing, doubled, out of order, changed
        on the way, or a callback fails. The tensors are views of the image: valid until the next update.
        """
        held, self.held, came = self.held, None, 0
        # The work is done beside, in order: the sender waits until a header is read.
        with ThreadPoolExecutor(1, "weights") as beside:
            faults: list[str] = []
            work = [beside.submit(_fault_of, begin)]
            while True:
                header = broadcast(self.group, torch.zeros(_FIELDS, dtype=torch.int64)).tolist()
                if header[1] == _END:
                    break
                payload = None
                if not self.shared:
                    payload = broadcast(self.group, torch.empty(header[4], dtype=torch.uint8))
                fault = self._place(header, payload, version, held, came)
                if fault:
                    faults.append(fault)
                else:
                    bucket, offset = self.cut[header[1]]
                    named = unpack(bucket, self.image[offset : offset + bucket[1]])
                    work.append(beside.submit(_fault_of, partial(take, named), self._first(header[1])))
                came += 1
            changed = self._missing(came)
            if not self.shared:
                sums = broadcast(self.group, torch.zeros(len(self.cut), dtype=torch.int64)).tolist()
                # Summed while the last buckets are being loaded.
                changed = changed or self._changed(sums)
            faults += [future.result() for future in work]
            fault = next(filter(None, faults), changed) or _fault_of(finish)
        gather_words(self.group, fault)
        if fault:
            raise UpdateFailed(fault)
        self.held = version

    def _place(self, header: list[int], payload: Tensor | None, version: int, held: int | None, due: int) -> str:
        """Read one bucket into the image; what is wrong with it, or ""."""
        told, index, base, encoding, _ = header
        if told != version:
            return f"bucket {index} is of version {told}, and {version} was announced"
        if index != due:
            return f"bucket {index} came where bucket {due} was due ({self._first(due)})"
        bucket, offset = self.cut[index]
        place = self.image[offset : offset + bucket[1]]
        if encoding == _SPARSE:
            if base != held:
                return f"bucket {index} changes version {base}, and this engine holds {held}"
            assert payload is not None
            return _fault_of(lambda: sparse.apply(payload, place.view(torch.int16)))
        if payload is not None:
            return _fault_of(lambda: place.copy_(payload))
        return ""

    def _missing(self, came: int) -> str:
        if came == len(self.cut):
            return ""
        return f"{came} buckets came of {len(self.cut)} ({self._first(came)} is missing)"

    def _changed(self, sums: list[int]) -> str:
        for index, ((bucket, offset), told) in enumerate(zip(self.cut, sums, strict=True)):
            if _sum(self.image[offset : offset + bucket[1]]) != told:
                return f"bucket {index} ({self._first(index)}) changed on its way"
        return ""

    def _first(self, index: int) -> str:
        """The first tensor of a bucket, by which a person finds it."""
        if not 0 <= index < len(self.cut):
            return "there is none"
        return f"from {self.cut[index][0][0][0][0][0]}"


def _fault_of(call: Callable[[], object], where: str = "") -> str:
    """What went wrong in a call. The sender must hear of it, whatever it is: it waits."""
    try:
        call()
    except Exception as error:
        return f"{where and f'bucket {where}: '}{type(error).__name__}: {error}"
    return ""


def _shorter(old: Tensor, new: Tensor) -> tuple[int, Tensor]:
    """The changes, or the whole where that is not longer."""
    payload = sparse.encode(old.view(torch.int16), new.view(torch.int16))
    return (_SPARSE, payload) if payload.numel() < new.numel() else (_DENSE, new)
