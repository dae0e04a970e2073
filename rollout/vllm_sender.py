"""vLLM's own trainer engines as senders: NCCL across GPUs, CUDA IPC on one."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from rl.weights import check_complete


class _Source(WeightSource):
    """The learner's weights in vLLM's terms. Each update is checked for completeness before anything is sent."""

    def __init__(self, weights: Any, expected: set[str]) -> None:
        self.weights, self.expected = weights, expected

    def metadata(self) -> list[ParamMeta]:
        metas = self.weights.metadata()
        check_complete({m.name for m in metas}, self.expected, "the engine")
        return [ParamMeta(m.name, getattr(torch, m.dtype), m.shape) for m in metas]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.weights)


def open_vllm_sender(
    backend: str, *, weights: Any, expected: set[str], client: Any, rank: int, timeout_s: float, **where: Any
) -> TrainerWeightTransferEngine[Any]:
    """As `rollout.sender.open_sender`, for "nccl" and "ipc"; vLLM's rendezvous has a deadline of its own."""
    del timeout_s
    info = (
        NCCLTrainerInitInfo(where["address"], where["port"], where["world_size"], rank=rank)
        if backend == "nccl"
        else IPCTrainerInitInfo(rank=rank, packed=True)
    )
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=_Source(weights, expected))
