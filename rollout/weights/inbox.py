"""An engine's end of the CPU weight channel: receives an update, checks it, and reports to the sender."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo

from rl.protocols import UpdateFailed
from rollout.weights import sparse
from rollout.weights.buckets import unpack
from rollout.weights.channel import (
    END_OF_UPDATE,
    HEADER_FIELDS,
    SPARSE,
    Layout,
    broadcast,
    checksum,
    gather_texts,
    map_shared,
    this_host,
)


class Inbox:
    """Meets the sender's `Outbox` when it is made, and receives one update per `receive`."""

    def __init__(self, group: ProcessGroupGloo, layout: Layout) -> None:
        self.group, self.buckets = group, layout.buckets()
        nbytes = sum(bucket[1] for bucket, _ in self.buckets)
        same_host = bool(layout.segment) and layout.host == this_host() and os.path.exists(layout.segment)
        image = map_shared(layout.segment, nbytes) if same_host else None
        replies = gather_texts(group, "shared" if same_host else "separate")
        self.shared = all(reply == "shared" for reply in replies)
        self.image = image if self.shared and image is not None else torch.zeros(nbytes, dtype=torch.uint8)
        self.held: int | None = None
        """Version of the image; None when it is not known to be complete."""

    def receive(
        self,
        version: int,
        begin: Callable[[], object],
        take: Callable[[list[tuple[str, Tensor]]], object],
        finish: Callable[[], object],
    ) -> None:
        """Pass each bucket's tensors to `take` as they arrive, and report to the sender whether all succeeded.

        `begin` is called before the first bucket, `finish` after the last. The sender gets the error, then UpdateFailed
        is raised here, when a bucket is missing, repeated, out of order or changed in transit, or a callback fails. The
        tensors are views of the image, valid until the next update.
        """
        base, self.held, count = self.held, None, 0
        # The callbacks run in another thread, in order, because the sender waits until a header is read.
        with ThreadPoolExecutor(1, "weights") as worker:
            errors: list[str] = []
            work = [worker.submit(error_of, begin)]
            while True:
                header = broadcast(self.group, torch.zeros(HEADER_FIELDS, dtype=torch.int64)).tolist()
                if header[1] == END_OF_UPDATE:
                    break
                payload = None
                if not self.shared:
                    payload = broadcast(self.group, torch.empty(header[4], dtype=torch.uint8))
                error = self._write(header, payload, version, base, count)
                if error:
                    errors.append(error)
                else:
                    bucket, offset = self.buckets[header[1]]
                    named = unpack(bucket, self.image[offset : offset + bucket[1]])
                    work.append(worker.submit(error_of, partial(take, named), self._first_tensor(header[1])))
                count += 1
            corrupt = self._incomplete(count)
            if not self.shared:
                sums = broadcast(self.group, torch.zeros(len(self.buckets), dtype=torch.int64)).tolist()
                # The sums are computed while the last buckets are being loaded.
                corrupt = corrupt or self._changed(sums)
            errors += [future.result() for future in work]
            error = next(filter(None, errors), corrupt) or error_of(finish)
        gather_texts(self.group, error)
        if error:
            raise UpdateFailed(error)
        self.held = version

    def _write(self, header: list[int], payload: Tensor | None, version: int, base: int | None, due: int) -> str:
        """Write one bucket into the image; returns an error message, or ""."""
        sent_version, index, sent_base, encoding, _ = header
        if sent_version != version:
            return f"bucket {index} is of version {sent_version}, but version {version} was announced"
        if index != due:
            return f"bucket {index} arrived instead of bucket {due} ({self._first_tensor(due)})"
        bucket, offset = self.buckets[index]
        place = self.image[offset : offset + bucket[1]]
        if encoding == SPARSE:
            if sent_base != base:
                return f"bucket {index} changes version {sent_base}, but this engine holds {base}"
            assert payload is not None
            return error_of(lambda: sparse.apply(payload, place.view(torch.int16)))
        if payload is not None:
            return error_of(lambda: place.copy_(payload))
        return ""

    def _incomplete(self, count: int) -> str:
        if count == len(self.buckets):
            return ""
        return f"{count} of {len(self.buckets)} buckets arrived (the first missing one: {self._first_tensor(count)})"

    def _changed(self, sums: list[int]) -> str:
        for index, ((bucket, offset), sent) in enumerate(zip(self.buckets, sums, strict=True)):
            if checksum(self.image[offset : offset + bucket[1]]) != sent:
                return f"bucket {index} ({self._first_tensor(index)}) changed in transit"
        return ""

    def _first_tensor(self, index: int) -> str:
        """The first tensor of a bucket, by which a reader can find it."""
        if not 0 <= index < len(self.buckets):
            return "no such bucket"
        (items, _), _ = self.buckets[index]
        (name, _, _), _ = items[0]
        return f"from {name}"


def error_of(call: Callable[[], object], bucket: str = "") -> str:
    """Call it; returns the error as text, or "". Every exception counts, because the sender waits for a report."""
    try:
        call()
    except Exception as error:  # it travels to the sender as text
        return f"{bucket and f'bucket {bucket}: '}{type(error).__name__}: {error}"
    return ""
