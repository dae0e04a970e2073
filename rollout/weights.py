"""How an engine's worker receives new weights, digests what arrives, and says which names it needs.

vLLM imports this module in its worker process (`worker_extension_cls`), before the model is built; that registers the
gloo backend, the digesting variants of vLLM's own NCCL and IPC engines, and the cached fp32 head.
"""

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import BroadcastOptions, ProcessGroup
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rl.weights import digest
from rollout.buckets import buckets, unpack
from rollout.head import forget_heads
from rollout.trace import Tracer


def broadcast(group: ProcessGroup, tensor: Tensor) -> None:
    """Broadcast from rank 0 over a group that is not the process's default one."""
    options = BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([tensor], options).wait()


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the trainer waits, and this engine's place in the group. `timeout_s` bounds every wait in it."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """Names, dtype names and shapes of one update, in the order of travel."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


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


class _Gloo(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives buckets over gloo on CPU and loads them through vLLM's layerwise reload.

    The reload is what repacks CPU linear weights (oneDNN): an in-place copy would change nothing, silently.
    """

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    group: ProcessGroup | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        parallel = self.parallel_config
        self.group = stateless_init_torch_distributed_process_group(
            init_info.master_address,
            init_info.master_port,
            init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank,
            init_info.world_size,
            "gloo",
            timeout=timedelta(seconds=init_info.timeout_s),
        )

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        assert self.group is not None, "init_transfer_engine comes first"
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        shapes = [tuple(shape) for shape in update_info.shapes]
        for bucket in buckets(zip(update_info.names, dtypes, shapes, strict=True)):
            # A fresh buffer each: the reload keeps views of it until a layer is whole.
            buffer = torch.empty(bucket[1], dtype=torch.uint8)
            broadcast(self.group, buffer)
            self.model.load_weights(unpack(bucket, buffer))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self.group = None


class GlooEngine(Digesting, _Gloo):
    """Weights over gloo between CPU processes."""


class NCCLEngine(Digesting, NCCLWeightTransferEngine):
    """vLLM's NCCL engine, digesting."""


class IPCEngine(Digesting, IPCWeightTransferEngine):
    """vLLM's CUDA IPC engine, digesting."""


def hf_names(model: nn.Module) -> set[str]:
    """The checkpoint names that must arrive for every parameter of a vLLM model to be new.

    Fused parameters are named by their parts; a tied head is not sent, for vLLM ties it itself.
    """
    fused = getattr(model, "packed_modules_mapping", {})
    names: set[str] = set()
    for name, _ in model.named_parameters():
        *parents, module, leaf = name.split(".")
        names |= {".".join([*parents, part, leaf]) for part in fused.get(module, [module])}
    if model.config.tie_word_embeddings:
        names.discard("lm_head.weight")
    return names


class WorkerExtension:
    """Methods that vLLM mixes into its worker, to be called by `collective_rpc`."""

    def end_with_parent(self) -> None:
        """From now on this process ends when the one that started it is gone, however that ended: vLLM's own processes
        live on after a kill, and keep their memory."""
        parent = os.getppid()

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(1.0)
            os._exit(1)

        threading.Thread(target=watch, daemon=True, name="end with parent").start()

    def expected_weights(self) -> list[str]:
        """Checkpoint names that an update must bring."""
        return sorted(hf_names(self.weight_transfer_engine.model))

    def listen_to_weights(self, on: bool) -> None:
        """Whether the next updates are digested as they arrive."""
        self.weight_transfer_engine.listening = on

    def received_digests(self) -> dict[str, str]:
        """Digests of the last update by name, empty unless listening."""
        return self.weight_transfer_engine.digests

    def begin_trace(self) -> None:
        """Record the layers of the next forward pass."""
        self.tracer = Tracer(self.weight_transfer_engine.model)

    def end_trace(self) -> dict[str, Any]:
        """What the layers took in and gave out: see `rollout.trace.Tracer.stop`."""
        return self.tracer.stop(getattr(self.weight_transfer_engine.model, "packed_modules_mapping", {}))


for _name, _engine in {"unison_gloo": GlooEngine, "unison_nccl": NCCLEngine, "unison_ipc": IPCEngine}.items():
    WeightTransferEngineFactory.register_engine(_name, _engine)
