"""An engine's end of the CPU channel."""

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
from rollout.weights.channel import _END, _FIELDS, _SPARSE, Layout, _map, _sum, broadcast, gather_words, this_host


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
