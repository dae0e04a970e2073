"""The trainer's end of the weight channel: vLLM's trainer transfer engines, and gloo beside them."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from rl.weights import TensorMeta, check_complete
from rollout.buckets import buckets, pack
from rollout.weights import GlooInitInfo, GlooUpdateInfo, broadcast


class Weights(Protocol):
    """What the learner offers: names ahead of time, then full tensors in that order (a collective over its ranks)."""

    def metadata(self) -> list[TensorMeta]: ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


class _Source(WeightSource):
    """The learner's weights in vLLM's terms. Each update is checked for completeness before anything is sent."""

    def __init__(self, weights: Weights, expected: set[str]) -> None:
        self.weights, self.expected = weights, expected

    def metadata(self) -> list[ParamMeta]:
        metas = self.weights.metadata()
        check_complete({m.name for m in metas}, self.expected, "the engine")
        return [ParamMeta(m.name, getattr(torch, m.dtype), m.shape) for m in metas]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.weights)


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """Where the engines find the trainer; `world_size` counts the sender and every worker."""

    backend: ClassVar[str] = "gloo"
    master_address: str
    master_port: int
    world_size: int
    timeout_s: float


class GlooTrainerEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """Sends buckets over gloo, on CPU."""

    init_info_cls = GlooTrainerInitInfo
    group: ProcessGroup | None = None

    @classmethod
    def trainer_init(cls, init_info: GlooTrainerInitInfo, *, client: Any, source: WeightSource | None = None) -> Self:
        assert source is not None, "gloo sends whole models: it needs a source"
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if not engine.is_sender:
            return engine
        worker = GlooInitInfo(
            init_info.master_address, init_info.master_port, 1, init_info.world_size, init_info.timeout_s
        )
        executor = ThreadPoolExecutor(1)
        try:
            joined = executor.submit(client.init_weight_transfer_engine, asdict(worker))
            engine.group = stateless_init_torch_distributed_process_group(
                init_info.master_address,
                init_info.master_port,
                0,
                init_info.world_size,
                "gloo",
                timeout=timedelta(seconds=init_info.timeout_s),
            )
            joined.result()
        finally:
            # Not joined: an engine that died in the rendezvous must not turn its error into a hang.
            executor.shutdown(wait=False)
        return engine

    def send_weights(self) -> None:
        assert self.source is not None
        meta = self.source.metadata()
        tensors = iter(self.source)
        if not self.is_sender:
            for _ in tensors:
                pass
            return
        info = GlooUpdateInfo(
            [m.name for m in meta], [str(m.dtype).split(".")[-1] for m in meta], [list(m.shape) for m in meta]
        )
        executor = ThreadPoolExecutor(1)
        try:
            self.client.start_weight_update()
            received = executor.submit(self.client.update_weights, asdict(info))
            for bucket in buckets((m.name, m.dtype, m.shape) for m in meta):
                self._send(pack(bucket, tensors), received)
            received.result()
        except BaseException:
            # The other ranks gather each layer together with this one, and would wait for it.
            for _ in tensors:
                pass
            raise
        finally:
            executor.shutdown(wait=False)
        self.client.finish_weight_update()

    def _send(self, buffer: Tensor, received: Future[None]) -> None:
        """Broadcast one bucket; when that fails, the engines' own error says more than gloo's."""
        try:
            broadcast(self.group, buffer)
        except RuntimeError:
            if received.done():
                received.result()
            raise


WeightTransferTrainerFactory.register_engine("gloo", GlooTrainerEngine)


def open_sender(
    backend: str,
    *,
    weights: Weights,
    expected: set[str],
    client: Any,
    rank: int,
    address: str,
    port: int,
    world_size: int,
    timeout_s: float,
) -> TrainerWeightTransferEngine[Any]:
    """Meet the engines and return what sends them the learner's weights; called on every learner rank.

    `expected` are the names that every update must bring, `client` carries vLLM's four control calls to all engines,
    `world_size` counts rank 0 and every engine worker. Raises ValueError for an unknown backend, and whatever the
    rendezvous raises after `timeout_s` seconds.
    """
    infos = {
        "gloo": lambda: GlooTrainerInitInfo(address, port, world_size, timeout_s, rank=rank),
        "nccl": lambda: NCCLTrainerInitInfo(address, port, world_size, rank=rank),
        "ipc": lambda: IPCTrainerInitInfo(rank=rank, packed=True),
    }
    if backend not in infos:
        raise ValueError(f"unknown weight channel {backend!r}; known: {sorted(infos)}")
    return WeightTransferTrainerFactory.trainer_init(infos[backend](), client=client, source=_Source(weights, expected))
