"""How an engine's worker process receives weights, digests them, names those it needs, and traces its layers.

vLLM imports this module in its worker process (`worker_extension_cls`), before the model is built. The import registers
the gloo backend, the digesting variants of vLLM's own NCCL and IPC engines, the cached fp32 head, and short blocks.
"""

import threading
from typing import Any

import torch
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader import dummy_loader
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from rollout.process import exit_when_orphaned, kill_with_parent
from rollout.sampler_trace import SamplerTrace
from rollout.trace import Tracer
from rollout.weights.names import expected, fused_modules
from rollout.weights.receive import GlooEngine
from rollout.weights.vllm_receive import IPCEngine, NCCLEngine, how_it_ended

# MKL chooses its kernels at a process's first call. Where two threads make that call together, one may get a kernel of
# half the digits; the model's cosines and sines are computed once. One element, one thread: see docs/parity.md.
torch.ones(1).cos()


random_weight, random_values = dummy_loader.initialize_single_dummy_weight, torch.empty(1 << 20)
random_weight(random_values)


def _start_weight(tensor: torch.Tensor) -> None:
    """vLLM's random weights, drawn once for all tensors and not for each: the learner's take their place."""
    if tensor.dtype != torch.float32 or not tensor.is_cpu or not tensor.is_contiguous():
        random_weight(tensor)
    else:
        for part in tensor.data.view(-1).split(len(random_values)):
            part.copy_(random_values[: len(part)])


dummy_loader.initialize_single_dummy_weight = _start_weight


@register_backend(AttentionBackendEnum.CPU_ATTN)
class ShortBlocks(CPUAttentionBackend):
    """vLLM's attention on a CPU, with the blocks of 16 tokens that its kernel `vec16` reads.

    vLLM chooses that kernel by the block, and declares 32 for all of them.
    """

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Multiples of 16 tokens."""
        return [MultipleOf(16)]


class WorkerExtension:
    """Methods that vLLM adds to its worker class; called with `collective_rpc`."""

    weight_transfer_engine: GlooEngine | NCCLEngine | IPCEngine
    """Set by vLLM's worker."""

    def end_with_parent(self, generations: int) -> None:
        """End this process when the engine's actor has ended, for whatever reason; it is `generations` above.

        Without this, vLLM's processes would survive a kill and keep their memory. A worker that is two generations
        below also ends the engine's process between them.
        """
        if isinstance(self.weight_transfer_engine, GlooEngine):
            kill_with_parent()  # the parent's thread is the engine's core, and ends with it
        threading.Thread(target=exit_when_orphaned, args=(generations,), daemon=True, name="exit when orphaned").start()

    def expected_weights(self, sent: list[str]) -> list[str]:
        """Names that every update must contain, in terms of those that the trainer sends."""
        return sorted(expected(self.weight_transfer_engine.model, sent))

    def joined_channel(self) -> str | None:
        """None while the rendezvous of the weight channel goes on in a thread; then an error message, or ""."""
        engine = self.weight_transfer_engine
        return engine.joined() if isinstance(engine, NCCLEngine) else ""

    def receive_aside(self, update_info: dict[str, Any]) -> None:
        """Over NCCL: begin to receive an update into spare memory, while sampling goes on. Returns at once."""
        self._nccl_engine().receive_aside(update_info)

    def received_aside(self) -> str | None:
        """None while the update arrives; then an error message, or ""."""
        spare = self._nccl_engine().spare
        assert spare is not None, "receive_aside comes first"
        return how_it_ended(spare)

    def load_spare(self) -> None:
        """Load the update that has arrived into the model."""
        self._nccl_engine().load_spare()

    def digest_updates(self, on: bool) -> None:
        """Set whether the tensors of the next updates are digested as they arrive."""
        self.weight_transfer_engine.digesting = on

    def stage_weights(self, version: int) -> str:
        """Begin to receive a version into a second copy of the model. Returns at once: an error message, or ""."""
        return self._gloo_engine().stage(version)

    def commit_error(self, version: int) -> str:
        """The reason why a staged version cannot be committed, or ""."""
        return self._gloo_engine().commit_error(version)

    def received_digests(self) -> dict[str, str]:
        """Digests of the last update by tensor name; empty unless `digest_updates` is on."""
        return self.weight_transfer_engine.digests

    def begin_trace(self) -> None:
        """Record the layers of the next forward passes."""
        self.tracer = Tracer(self.weight_transfer_engine.model)

    def end_trace(self) -> dict[str, Any]:
        """The recorded inputs and outputs of the layers: see `rollout.trace.Tracer.stop`."""
        return self.tracer.stop(fused_modules(self.weight_transfer_engine.model))

    def begin_sampler_trace(self) -> None:
        """Record what the sampler does with the next request."""
        runner: Any = self  # vLLM's worker, which this class is mixed into
        self.sampler_trace = SamplerTrace()
        self.sampler_trace.start(self.weight_transfer_engine.model, getattr(runner.model_runner, "sampler", None))

    def end_sampler_trace(self) -> dict[str, Any]:
        """The records: see `rollout.sampler_trace.SamplerTrace.stop`."""
        return self.sampler_trace.stop()

    def _nccl_engine(self) -> NCCLEngine:
        assert isinstance(self.weight_transfer_engine, NCCLEngine), "only NCCL receives into spare memory"
        return self.weight_transfer_engine

    def _gloo_engine(self) -> GlooEngine:
        assert isinstance(self.weight_transfer_engine, GlooEngine), "only the CPU channel stages weights"
        return self.weight_transfer_engine


for _name, _engine in {"unison_gloo": GlooEngine, "unison_nccl": NCCLEngine, "unison_ipc": IPCEngine}.items():
    WeightTransferEngineFactory.register_engine(_name, _engine)
