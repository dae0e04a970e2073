"""The CPU weight channel as one of vLLM's transfer engines: receives into a second copy of the model, then swaps."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from rollout.head import forget_heads
from rollout.weights.channel import Layout, join
from rollout.weights.inbox import Inbox
from rollout.weights.staged import StagedUpdate
from rollout.weights.twin import Twin


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """The trainer's address, this engine's place in the group, and a `Layout`. `timeout_s` bounds every wait."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float
    layout: dict[str, Any]


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """Empty: see `GlooEngine.receive_weights`."""


class GlooEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Weights between CPU processes: received into a twin of the live model while the live model samples."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    inbox: Inbox | None = None
    staged: StagedUpdate | None = None
    digesting = False
    threads: list[ThreadPoolExecutor] = []
    """The two loading threads. They are kept between updates: the allocator gives each thread its own memory, and the
    pages of the last update are reused."""
    spare: Future[Twin] | None = None
    """The twin for the next update. It is built right after an update, so that the next sender need not wait for it."""

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        i = init_info
        self.digests: dict[str, str] = {}
        # One OpenMP thread each: two of them that wait for each other would spin on the cores.
        self.threads = self.threads or [
            ThreadPoolExecutor(1, name, torch.set_num_threads, (1,)) for name in ("load half 1", "load half 2")
        ]
        self.inbox = Inbox(join(i.master_address, i.master_port, rank, i.world_size, i.timeout_s), Layout(**i.layout))

    def stage(self, version: int) -> str:
        """Begin to receive a version in a thread, which reports to the sender. Returns an error message, or ""."""
        assert self.inbox is not None, "init_transfer_engine comes first"
        if self.staged:
            if self.staged.inbox is self.inbox:
                self.staged.join(1.0)  # the sender gets the report shortly before the thread ends
                if self.staged.is_alive():
                    return f"version {self.staged.version} is still being received"
            self.staged.drop()
        twin, self.spare = self.spare or self._new_twin(), None
        self.staged = StagedUpdate(self.inbox, self.threads, twin, self.model_config, version, self.digesting)
        return ""

    def _new_twin(self) -> Future[Twin]:
        return self.threads[0].submit(torch.no_grad()(Twin), self.model)

    def start_weight_update(self) -> None:
        """Nothing to do: the new weights have arrived."""

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """vLLM's base class requires it, for channels that receive into the live model."""
        raise NotImplementedError("this channel receives into a twin of the live model: see `stage`")

    def finish_weight_update(self) -> None:
        """Swap the live weights for the staged ones."""
        assert self.staged is not None, "commit_error comes first"
        self.digests = self.staged.commit()
        self.staged = None
        forget_heads(self.model)
        self.spare = self._new_twin()

    def commit_error(self, version: int) -> str:
        """The reason why a version cannot be committed, or ""."""
        if self.staged is None or self.staged.version != version:
            return f"it was not received; the staged version is {self.staged and self.staged.version}"
        return "" if self.staged.complete else "it was not received completely"

    def shutdown(self) -> None:
        self.inbox = None
