"""vLLM's NCCL and CUDA IPC transfer engines, extended by a digest of every tensor that arrives."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from rl.weights import digest
from rollout.head import forget_heads


class DigestingModel:
    """Takes the model's place while weights arrive: digests each tensor, then loads it into the model."""

    def __init__(self, model: nn.Module, digests: dict[str, str]) -> None:
        self.model: Any = model
        self.digests = digests

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        weights = list(weights)
        self.digests.update({name: digest(tensor) for name, tensor in weights})
        return self.model.load_weights(weights)


class DigestingEngine(WeightTransferEngine[Any, Any]):
    """A transfer engine that digests arriving tensors while `digesting`, and drops the cast head after an update.

    The two classes below put it in front of vLLM's engine, which does the transfer.
    """

    digesting = False

    def start_weight_update(self) -> None:
        super().start_weight_update()
        self.digests: dict[str, str] = {}

    def receive_weights(self, update_info: Any) -> None:
        model: Any = self.model
        if self.digesting:
            self.model = DigestingModel(model, self.digests)
        try:
            super().receive_weights(update_info)
        finally:
            self.model = model

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        forget_heads(self.model)


class NCCLEngine(DigestingEngine, NCCLWeightTransferEngine):
    """vLLM's NCCL engine with digests."""


class IPCEngine(DigestingEngine, IPCWeightTransferEngine):
    """vLLM's CUDA IPC engine with digests."""
