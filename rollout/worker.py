"""How an engine's worker receives new weights, digests what arrives, and says which names it needs.

vLLM imports this module in its worker process (`worker_extension_cls`), before the model is built; that registers the
gloo backend, the digesting variants of vLLM's own NCCL and IPC engines, and the cached fp32 head.
"""

import threading
from typing import Any

from torch import nn
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from rollout.orphan import die_with_parent, end_with
from rollout.trace import Tracer
from rollout.weights.receive import GlooEngine
from rollout.weights.vllm_receive import IPCEngine, NCCLEngine


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
        live on after a kill, and keep their memory. A worker of several stands a generation lower: it sees to the
        engine's process, too."""
        if isinstance(self.weight_transfer_engine, GlooEngine):
            die_with_parent()  # on CPU the parent is a fork server of one thread
        several = self.weight_transfer_engine.parallel_config.world_size > 1
        threading.Thread(target=end_with, args=(2 if several else 1,), daemon=True, name="end with parent").start()

    def expected_weights(self) -> list[str]:
        """Checkpoint names that an update must bring."""
        return sorted(hf_names(self.weight_transfer_engine.model))

    def listen_to_weights(self, on: bool) -> None:
        """Whether the next updates are digested as they arrive."""
        self.weight_transfer_engine.listening = on

    def stage_weights(self, version: int) -> str:
        """Begin to receive a version beside the live weights; returns at once, with what is against it or ""."""
        return self.weight_transfer_engine.stage(version)

    def against_commit(self, version: int) -> str:
        """Why a staged version cannot be committed, or ""."""
        return self.weight_transfer_engine.against_commit(version)

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
