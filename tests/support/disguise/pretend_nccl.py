"""vLLM's `PyNcclCommunicator` without GPUs, over the store where the group met. It waits for peers for ever."""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

LOOK_S = 0.002


class PretendNccl:
    """Broadcasts from rank 0. Only an abort ends a wait, also where a peer has died."""

    made: ClassVar[list["PretendNccl"]] = []
    freed: ClassVar[list["PretendNccl"]] = []
    broadcasts: ClassVar[int] = 0
    """Of rank 0, in this process."""
    before: ClassVar[Callable[["PretendNccl", str], None]] = lambda comm, phase: None
    """Called at the start of "join" and of each "broadcast"; a test may raise, kill or wait there."""

    over: ClassVar[threading.Event] = threading.Event()
    """Set by a test at its end: a thread that still asked its store would abort the process when that ends."""

    def __init__(self, group: Any, device: Any) -> None:
        self.group, self.rank, self.world_size = group, group.rank, group.world_size
        self.device = SimpleNamespace(index=None)
        self.available, self.disabled = True, False
        self.aborted = self.comm = threading.Event()
        self.nccl = SimpleNamespace(ncclCommAbort=self._free)
        self.thread = threading.get_ident()
        self.count = 0
        over = PretendNccl.over
        PretendNccl.before(self, "join")
        group.store.add("nccl/joined", 1)
        while group.store.add("nccl/joined", 0) < self.world_size:
            if over.wait(LOOK_S):
                raise RuntimeError("the test has ended")
        PretendNccl.made.append(self)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        if self.disabled:
            return
        assert src == 0
        self.count += 1
        PretendNccl.before(self, "broadcast")
        store, sent, taken = self.group.store, f"nccl/{self.count}", f"nccl/{self.count}/taken"
        if self.rank == 0:
            PretendNccl.broadcasts += 1
            store.set(sent, tensor.numpy().tobytes())
            if self._until(lambda: store.add(taken, 0) == self.world_size - 1):
                store.delete_key(sent)
        elif self._until(lambda: store.check([sent])):
            tensor.copy_(torch.frombuffer(bytearray(store.get(sent)), dtype=torch.uint8))
            store.add(taken, 1)

    def destroy(self) -> None:
        if self.available and not self.disabled:
            self._free(self.comm)
            self.available, self.disabled = False, True

    def _until(self, come: Callable[[], bool]) -> bool:
        """Whether it came before an abort. Where the store is gone nothing comes."""
        while not self.aborted.is_set():
            try:
                if come():
                    return True
            except RuntimeError:
                self.aborted.wait()
            time.sleep(LOOK_S)
        return False

    def _free(self, comm: Any) -> None:
        assert not comm.is_set(), "freed twice"
        comm.set()
        PretendNccl.freed.append(self)


class Stream:
    """A CUDA stream on which all work is done at once."""

    device = None

    def synchronize(self) -> None:
        pass


def without_devices(packed_tensor: Any) -> dict[tuple[Any, str], Any]:
    """What else must be replaced where there is no GPU, by (object, attribute)."""
    streams = (Stream(), Stream())
    return {
        (packed_tensor, "_get_streams"): lambda *_: streams,
        (torch.accelerator, "current_device_index"): lambda: None,
        (torch.accelerator, "synchronize"): lambda *_: None,
    }
