"""vLLM's NCCL and CUDA IPC transfer engines, with a digest of every tensor that arrives."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from rl.weights import digest
from rollout.head import forget_heads


class _Listener:
    """Stands in for the model while weights arrive: digests each tensor, then loads it."""

    def __init__(self, model: nn.Module, digests: dict[str, str]) -> None:
        self.model, self.digests = model, digests

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        weights = list(weights)
        self.digests.update({name: digest(tensor) for name, tensor in weights})
        return self.model.load_weights(weights)


class Digesting:
    """Mixin for a transfer engine: digests arriving tensors when told to, and drops what was cast from old ones."""

    listening = False

    def start_weight_update(self) -> None:
        super().start_weight_update()
        self.digests: dict[str, str] = {}

    def receive_weights(self, update_info: Any) -> None:
        model = self.model
        if self.listening:
            self.model = _Listener(model, self.digests)
        try:
            super().receive_weights(update_info)
        finally:
            self.model = model

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        forget_heads(self.model)


class NCCLEngine(Digesting, NCCLWeightTransferEngine):
    """vLLM's NCCL engine, digesting."""


class IPCEngine(Digesting, IPCWeightTransferEngine):
    """vLLM's CUDA IPC engine, digesting."""
