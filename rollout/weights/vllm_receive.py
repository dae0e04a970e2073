"""vLLM's NCCL and CUDA IPC transfer engines, extended by a digest of every tensor that arrives."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from rl.weights import digest
from rollout.head import forget_heads
from rollout.weights.group import check_usable


class DigestingModel(nn.Module):
    """Takes the model's place while weights arrive: digests each tensor, then loads it into the model."""

    def __init__(self, model: nn.Module, digests: dict[str, str]) -> None:
        super().__init__()
        self.model: Any = model
        self.digests = digests

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        weights = list(weights)
        self.digests.update({name: digest(tensor) for name, tensor in weights})
        return self.model.load_weights(weights)


@contextmanager
def digested(engine: "NCCLEngine | IPCEngine") -> Iterator[None]:
    """Digest what the engine receives in this block, if it is `digesting`."""
    model = engine.model
    if engine.digesting:
        engine.model = DigestingModel(model, engine.digests)
    try:
        yield
    finally:
        engine.model = model


class NCCLEngine(NCCLWeightTransferEngine):
    """vLLM's NCCL engine with digests; after an update it drops the head that was cast from the old weights."""

    digesting = False

    def init_transfer_engine(self, init_info: Any) -> None:
        super().init_transfer_engine(init_info)
        check_usable(self.model_update_group)

    def start_weight_update(self) -> None:
        super().start_weight_update()
        self.digests: dict[str, str] = {}

    def receive_weights(self, update_info: Any) -> None:
        with digested(self):
            super().receive_weights(update_info)

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        forget_heads(self.model)


class IPCEngine(IPCWeightTransferEngine):
    """vLLM's CUDA IPC engine with digests; otherwise as `NCCLEngine`."""

    digesting = False

    def start_weight_update(self) -> None:
        super().start_weight_update()
        self.digests: dict[str, str] = {}

    def receive_weights(self, update_info: Any) -> None:
        with digested(self):
            super().receive_weights(update_info)

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        forget_heads(self.model)
