"""The learner's end of the CPU channel."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo

from rl.protocols import UpdateFailed
from rollout.weights import sparse
from rollout.weights.buckets import pack
from rollout.weights.channel import (
    _DENSE,
    _END,
    _SPARSE,
    Layout,
    _begin,
    _errors_of_gloo,
    _map,
    _sum,
    broadcast,
    gather_words,
)

ANCHOR_EVERY = 50
"""Updates after which one is sent whole, whatever changed."""


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


def _shorter(old: Tensor, new: Tensor) -> tuple[int, Tensor]:
    """The changes, or the whole where that is not longer."""
    payload = sparse.encode(old.view(torch.int16), new.view(torch.int16))
    return (_SPARSE, payload) if payload.numel() < new.numel() else (_DENSE, new)
