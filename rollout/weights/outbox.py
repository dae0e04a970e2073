"""The learner's end of the CPU weight channel: sends an update, whole or as changes, and collects the reports."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo

from rl.protocols import UpdateFailed
from rollout.weights import sparse
from rollout.weights.buckets import pack
from rollout.weights.channel import (
    DENSE,
    END_OF_UPDATE,
    SPARSE,
    Layout,
    begin_broadcast,
    broadcast,
    checksum,
    gather_texts,
    gloo_errors,
    map_shared,
)

ANCHOR_EVERY = 50
"""Every so many updates, all values are sent, whatever changed."""
NO_PAYLOAD = torch.empty(0, dtype=torch.uint8)


class Outbox:
    """Meets every receiver's `Inbox` when it is made; an update is one `send` and one `finish`."""

    def __init__(self, group: ProcessGroupGloo, layout: Layout) -> None:
        """`layout.segment` is the shared-memory file, or "". The caller unlinks it once both sides have mapped it."""
        self.group, self.buckets = group, layout.buckets()
        self.nbytes = sum(bucket[1] for bucket, _ in self.buckets)
        replies = gather_texts(group, "shared" if layout.segment else "separate")
        self.shared = all(reply == "shared" for reply in replies)
        if self.shared:
            self.image = map_shared(layout.segment, self.nbytes)
        else:
            self.image = torch.zeros(self.nbytes, dtype=torch.uint8)
        self.held: int | None = None
        """The image's version, which every receiver holds; None when that is not certain."""
        self.since_anchor = 0
        self.scratch: Tensor | None = None
        self.headers: list[Any] = []
        """Headers being sent. With shared memory the sender need not wait until a receiver has time to read them."""
        self.sent_bytes = 0
        """Bytes that the last update wrote to the network or to shared memory."""

    def send(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Send these tensors; returns when every receiver can read all bytes."""
        base, self.held, self.sent_bytes = self.held, None, 0
        if base is None or self.since_anchor >= ANCHOR_EVERY:
            base, self.since_anchor = None, 0
        self.since_anchor += 1
        self.version = version
        if self.shared:
            # Headers go out after the copy: a receiver that loads the first bucket would compete for the core that
            # copies the others.
            for bucket, offset in self.buckets:
                pack(bucket, tensors, into=self.image[offset : offset + bucket[1]])
            for index in range(len(self.buckets)):
                self._send_bucket(index, None, DENSE, NO_PAYLOAD)
            self.held, self.sent_bytes = version, self.nbytes
            return
        for index, (bucket, offset) in enumerate(self.buckets):
            place = self.image[offset : offset + bucket[1]]
            if base is not None and all(meta[1].itemsize == 2 for meta, _ in bucket[0]):
                new = pack(bucket, tensors, into=self._scratch(bucket[1]))
                encoding, payload = encode(place, new)
                if encoding == DENSE:
                    place.copy_(new)
                else:
                    sparse.apply(payload, place.view(torch.int16))
            else:
                encoding, payload = DENSE, pack(bucket, tensors, into=place)
            self._send_bucket(index, base if encoding == SPARSE else None, encoding, payload)
            self.sent_bytes += payload.numel()
        self.held = version

    def _scratch(self, nbytes: int) -> Tensor:
        """Memory for the new values of one bucket, allocated once: fresh pages cost more than the copy."""
        if self.scratch is None:
            self.scratch = torch.zeros(max(bucket[1] for bucket, _ in self.buckets), dtype=torch.uint8)
        return self.scratch[:nbytes]

    def finish(self) -> None:
        """Send the end of the update with the buckets' checksums, and wait for every receiver's report.

        Raises UpdateFailed with the reported errors.
        """
        self._send_bucket(END_OF_UPDATE, None, DENSE, NO_PAYLOAD)
        with gloo_errors():
            while self.headers:
                self.headers.pop(0).wait()
        if not self.shared:  # where both ends read the same memory, nothing can change in transit
            broadcast(self.group, torch.tensor([checksum(self.image[o : o + b[1]]) for b, o in self.buckets]))
        errors = {f"engine worker {i}": e for i, e in enumerate(gather_texts(self.group, "")[1:]) if e}
        if errors:
            self.held = None
            raise UpdateFailed(
                f"weight update {self.version} was refused: " + "; ".join(f"{who}: {e}" for who, e in errors.items())
            )

    def _send_bucket(self, index: int, base: int | None, encoding: int, payload: Tensor) -> None:
        header = torch.tensor([self.version, index, -1 if base is None else base, encoding, payload.numel()])
        if self.shared:
            with gloo_errors():
                self.headers.append(begin_broadcast(self.group, header))
            return
        broadcast(self.group, header)
        if payload.numel():
            broadcast(self.group, payload)


def encode(old: Tensor, new: Tensor) -> tuple[int, Tensor]:
    """The encoding and payload of a bucket: the changes, or all values where the changes are not shorter."""
    payload = sparse.encode(old.view(torch.int16), new.view(torch.int16))
    return (SPARSE, payload) if payload.numel() < new.numel() else (DENSE, new)
