"""vLLM's own trainer engines as senders: NCCL between GPUs, CUDA IPC on one GPU."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from rl.weights import check_complete
from rollout.weights.protocols import Weights


class Source(WeightSource):
    """The learner's weights as vLLM's `WeightSource`. Each update is checked to be complete before it is sent."""

    def __init__(self, weights: Weights, expected: set[str]) -> None:
        self.weights, self.expected = weights, expected
        self.begin()

    def begin(self) -> None:
        """Start the next update from its first tensor."""
        self.remaining = iter(self.weights)

    def metadata(self) -> list[ParamMeta]:
        metas = self.weights.metadata()
        check_complete({m.name for m in metas}, self.expected, "the engine")
        return [ParamMeta(m.name, getattr(torch, m.dtype), m.shape) for m in metas]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.remaining


class DrainingSender:
    """One of vLLM's senders. However an update ends, this rank takes part in gathering every tensor, because the other
    ranks do so and would wait for it."""

    def __init__(self, sender: TrainerWeightTransferEngine[Any], source: Source) -> None:
        self.sender, self.source = sender, source

    def send_weights(self) -> None:
        """Send the learner's current weights."""
        self.source.begin()
        try:
            self.sender.send_weights()
        finally:
            for _ in self.source:
                pass


def open_vllm_sender(
    backend: str, *, weights: Weights, expected: set[str], client: Any, rank: int, timeout_s: float, **where: Any
) -> DrainingSender:
    """`rollout.weights.sender.open_sender` for "nccl" and "ipc". vLLM's rendezvous has its own deadline."""
    del timeout_s
    info = (
        NCCLTrainerInitInfo(where["address"], where["port"], where["world_size"], rank=rank)
        if backend == "nccl"
        else IPCTrainerInitInfo(rank=rank, packed=True)
    )
    source = Source(weights, expected)
    return DrainingSender(WeightTransferTrainerFactory.trainer_init(info, client=client, source=source), source)
