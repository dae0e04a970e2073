"""vLLM's own trainer engines as senders: NCCL between GPUs, CUDA IPC on one GPU."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_open_port

from rl.weights import check_complete
from rollout.weights.group import check_usable
from rollout.weights.protocols import Weights

SMALLEST_BUFFER = 256 * 2**20
"""Bytes of the buffer through which CUDA IPC sends, at least; no tensor may be larger than it."""


class Source(WeightSource):
    """The learner's weights as vLLM's `WeightSource`. Each update is checked to be complete before it is sent.

    vLLM packs tensors on CUDA streams of its own, which wait for nobody. Every tensor is therefore drawn (and gathered)
    on the stream of the learner, and is complete before vLLM reads it.
    """

    def __init__(self, weights: Weights, expected: set[str]) -> None:
        self.weights, self.expected = weights, expected
        self.begin()

    def begin(self) -> None:
        """Start the next update from its first tensor."""
        self.remaining = iter(self.weights)
        self.home = torch.cuda.current_stream() if torch.cuda.is_available() else None
        """The learner's CUDA stream; None without CUDA."""

    def metadata(self) -> list[ParamMeta]:
        metas = self.weights.metadata()
        check_complete({m.name for m in metas}, self.expected, "the engine")
        return [ParamMeta(m.name, getattr(torch, m.dtype), m.shape) for m in metas]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        # `next`, and no loop over them: a reader that stops half way must not close them for `DrainingSender`.
        while True:
            with torch.cuda.stream(self.home):
                item = next(self.remaining, None)
            if item is None:
                return
            if self.home is not None:
                self.home.synchronize()
                # The memory is the home stream's; it may be given to the next tensor only after the reader is done.
                item[1].record_stream(torch.cuda.current_stream())
            yield item


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
    """`rollout.weights.sender.open_sender` for "nccl" and "ipc". vLLM's rendezvous has its own deadline.

    Raises RuntimeError where NCCL is switched off or did not load: every broadcast would then do nothing.
    """
    del timeout_s
    source = Source(weights, expected)
    if backend == "nccl":
        # vLLM binds the port itself, a moment from now.
        info = NCCLTrainerInitInfo(where["address"], get_open_port(), where["world_size"], rank=rank)
    else:
        largest = max(m.nbytes for m in weights.metadata())
        info = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=max(SMALLEST_BUFFER, largest))
    # vLLM's communicator makes a new stream the current one of this thread; the learner goes on with its own.
    with torch.cuda.stream(source.home):
        sender = WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
    if backend == "nccl" and rank == 0:
        check_usable(getattr(sender, "model_update_group", None))
    return DrainingSender(sender, source)
