"""The engine's end of the CPU channel, as one of vLLM's own transfer engines."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from rl.protocols import UpdateFailed
from rl.weights import digest
from rollout.head import forget_heads
from rollout.weights.channel import Layout, join
from rollout.weights.inbox import Inbox
from rollout.weights.twin import Twin, keep_freed_memory


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the trainer waits, this engine's place in the group, and a `Layout`. `timeout_s` bounds every wait."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float
    layout: dict[str, Any]


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """Nothing: see `GlooEngine.receive_weights`."""


class GlooEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Weights between CPU processes: received and built beside the live model, while it samples."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    inbox: Inbox | None = None
    staged: "_Staged | None" = None
    listening = False
    threads: "list[ThreadPoolExecutor] | None" = None
    """Kept from update to update, for the allocator gives each thread its own memory, which is then warm."""
    spare: "Future[Twin] | None" = None
    """The twin for the next update, begun right after the last one: the sender need not wait for it."""

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        i = init_info
        self.digests: dict[str, str] = {}
        keep_freed_memory()
        # One OpenMP thread in each: two that wait for one another spin on the cores.
        self.threads = self.threads or [
            ThreadPoolExecutor(1, name, torch.set_num_threads, (1,)) for name in ("one half", "other half")
        ]
        self.inbox = Inbox(join(i.master_address, i.master_port, rank, i.world_size, i.timeout_s), Layout(**i.layout))

    def stage(self, version: int) -> str:
        """Begin to receive a version, in a thread: the sender hears how it ends. Returns what is against it, or ""."""
        assert self.inbox is not None, "init_transfer_engine comes first"
        if self.staged:
            if self.staged.inbox is self.inbox:
                self.staged.join(1.0)  # the sender hears that it is through a moment before its thread ends
                if self.staged.is_alive():
                    return f"version {self.staged.version} is being received already"
            self.staged.drop()
        twin, self.spare = self.spare or self._twin(), None
        self.staged = _Staged(self.inbox, self.threads, twin, self.model_config, version, self.listening)
        return ""

    def _twin(self) -> "Future[Twin]":
        assert self.threads
        return self.threads[0].submit(torch.no_grad()(Twin), self.model)

    def start_weight_update(self) -> None:
        """Nothing to begin: the new weights are there."""

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        raise NotImplementedError("this channel receives beside the live model: see `stage`")

    def finish_weight_update(self) -> None:
        """Exchange the live weights for the staged ones."""
        assert self.staged is not None, "against_commit comes first"
        self.digests = self.staged.commit()
        self.staged = None
        forget_heads(self.model)
        self.spare = self._twin()

    def against_commit(self, version: int) -> str:
        """Why that version cannot be committed, or ""."""
        if self.staged is None or self.staged.version != version:
            return f"it was not received; staged is {self.staged and self.staged.version}"
        return "" if self.staged.whole else "it is not here as a whole"

    def shutdown(self) -> None:
        self.inbox = None


class _Staged(threading.Thread):
    """One update on its way into a twin of the model."""

    def __init__(
        self,
        inbox: Inbox,
        threads: list[ThreadPoolExecutor],
        made: Future[Twin],
        model_config: Any,
        version: int,
        listening: bool,
    ) -> None:
        super().__init__(daemon=True, name=f"weights {version}")
        self.inbox, self.threads, self.made, self.model_config = inbox, threads, made, model_config
        self.version, self.listening = version, listening
        self.digests: dict[str, str] = {}
        self.twin: Twin | None = None
        self.deal = Deal()
        self.whole, self.wanted = False, True
        self.loading: list[tuple[str, Future[None]]] = []
        """What they have to do, by the first tensor of each bucket."""
        self.start()

    def run(self) -> None:
        try:
            # The sender has been told, or its connection is gone.
            with suppress(UpdateFailed):
                self.inbox.receive(self.version, self._begin, self._take, self._finish)
        finally:
            for _, loading in self.loading:
                loading.cancel()
            wait(loading for _, loading in self.loading)
            if self.twin and not (self.whole and self.wanted):
                self.twin.close()

    def drop(self) -> None:
        """It will not be committed."""
        self.wanted = False
        if self.twin and not self.is_alive():
            self.twin.close()

    def _begin(self) -> None:
        self.twin = self.made.result()

    @torch.no_grad()
    def _finish(self) -> None:
        for name, loading in self.loading:
            try:
                loading.result()
            except Exception as error:  # whatever it is: the sender waits to hear of it, and by which bucket
                raise UpdateFailed(f"bucket from {name}: {type(error).__name__}: {error}") from error
        assert self.twin
        self.twin.finish(self.model_config)
        self.whole = True

    def _take(self, weights: list[tuple[str, Tensor]]) -> None:
        if self.listening:
            self.digests |= {name: digest(tensor) for name, tensor in weights}
        # Copies and oneDNN's packing run on one core each, and layers know nothing of each other: each thread goes on
        # with its own, and they meet at the end.
        for thread, half in zip(self.threads, self.deal.halves(weights), strict=True):
            self.loading.append((weights[0][0], thread.submit(self._load, half)))

    @torch.no_grad()
    def _load(self, weights: list[tuple[str, Tensor]]) -> None:
        assert self.twin
        self.twin.load(weights)

    def commit(self) -> dict[str, str]:
        """Make the new weights the live ones; returns their digests, if it listened."""
        assert self.twin
        self.twin.commit()
        return self.digests


class Deal:
    """Which of two threads loads what: a layer goes to the one with fewer bytes so far, and all of it to that one."""

    def __init__(self) -> None:
        self.homes: dict[str, int] = {}
        self.bytes = [0, 0]

    def halves(self, weights: list[tuple[str, Tensor]]) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
        """A thread's share each, in the order given. A tensor of no layer is a layer of its own."""
        shares: tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]] = ([], [])
        for name, tensor in weights:
            layer = next((part for part in name.split(".") if part.isdecimal()), name)
            home = self.homes.setdefault(layer, int(self.bytes[0] > self.bytes[1]))
            self.bytes[home] += tensor.nbytes
            shares[home].append((name, tensor))
        return shares
