"""vLLM's NCCL and CUDA IPC transfer engines, extended by deadlines and a digest of every tensor."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from rl.weights import digest
from rollout.head import forget_heads
from rollout.weights.group import in_thread, join, leave, watched


class Arrivals(nn.Module):
    """Takes the model's place while weights arrive: digests each tensor if wanted, then loads it into the model.

    After an error it loads nothing more and keeps the error. The rest must still arrive, because all members of a
    group would wait for one that left.
    """

    def __init__(self, model: nn.Module, digests: dict[str, str] | None) -> None:
        super().__init__()
        self.model: Any = model
        self.digests = digests
        self.error: Exception | None = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        if self.error:
            return None
        try:
            weights = list(weights)
            if self.digests is not None:
                self.digests.update({name: digest(tensor) for name, tensor in weights})
            return self.model.load_weights(weights)
        except Exception as error:  # whatever it is, it is raised when all has arrived
            self.error = error


class Kept(nn.Module):
    """Takes the model's place while weights arrive in spare memory: keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[tuple[str, Tensor]] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.weights += weights


@contextmanager
def arriving(engine: "NCCLEngine | IPCEngine") -> Iterator[None]:
    """Let what the engine receives in this block go through `Arrivals`. Raises the error of the model at its end."""
    model = engine.model
    engine.model = arrivals = Arrivals(model, engine.digests if engine.digesting else None)
    try:
        yield
    finally:
        engine.model = model
    if arrivals.error:
        raise arrivals.error


@dataclass(kw_only=True)
class NCCLInitInfo(NCCLWeightTransferInitInfo):
    """vLLM's, and the seconds that the rendezvous and each update may take."""

    timeout_s: float


class NCCLEngine(NCCLWeightTransferEngine):
    """vLLM's NCCL engine with deadlines and digests; after an update it drops the head cast from the old weights."""

    init_info_cls = NCCLInitInfo
    digesting = False
    joining: Future[Any] | None = None
    """The group, once this worker has joined it."""
    spare: Future[list[tuple[str, Tensor]]] | None = None
    """An update that arrives while the model samples."""

    def init_transfer_engine(self, init_info: Any) -> None:
        """Begin to join in a thread, after leaving the group before. Returns at once: see `joined`."""
        self.shutdown()
        i = init_info
        self.packed, self.timeout_s = i.packed, i.timeout_s
        self.packed_buffer_size_bytes, self.packed_num_buffers = i.packed_buffer_size_bytes, i.packed_num_buffers
        parallel = self.parallel_config
        rank = i.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        device = torch.accelerator.current_device_index()
        meet = partial(join, i.master_address, i.master_port, rank, i.world_size, i.timeout_s, device)
        self.joining = in_thread(meet, "join the weight channel")

    def joined(self) -> str | None:
        """None while this worker waits for the others; then an error message, or ""."""
        assert self.joining is not None, "init_transfer_engine comes first"
        if (error := how_it_ended(self.joining)) == "":
            self.model_update_group = self.joining.result()
        return error

    def shutdown(self) -> None:
        """Leave the group."""
        if self.joining is not None:
            self.joining.add_done_callback(leave)
        self.joining = self.model_update_group = None

    def start_weight_update(self) -> None:
        super().start_weight_update()
        self.digests: dict[str, str] = {}

    def receive_weights(self, update_info: Any) -> None:
        with watched(self.model_update_group, self.timeout_s), arriving(self):
            super().receive_weights(update_info)

    def receive_aside(self, update_info: dict[str, Any]) -> None:
        """Begin to receive an update into spare memory, in a thread. Returns at once: see `how_it_ended`."""
        aside, device = copy(self), torch.accelerator.current_device_index()
        aside.model = kept = Kept()

        def receive() -> list[tuple[str, Tensor]]:
            with torch.accelerator.device_index(device), watched(self.model_update_group, self.timeout_s):
                NCCLWeightTransferEngine.receive_weights(aside, self.parse_update_info(update_info))
            return kept.weights

        self.spare = in_thread(receive, "receive weights")

    def load_spare(self) -> None:
        """Load what has arrived in spare memory into the model, which stands still, and free the memory."""
        assert self.spare is not None, "receive_aside comes first"
        arrived, self.spare = self.spare, None
        with arriving(self):
            model: Any = self.model
            model.load_weights(arrived.result())
        # The memory is that of the thread's streams, which may write the next update there as soon as it is free.
        torch.accelerator.synchronize()

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        forget_heads(self.model)


def how_it_ended(future: Future[Any]) -> str | None:
    """None while it goes on; then an error message, or ""."""
    if not future.done():
        return None
    error = future.exception()
    return f"{type(error).__name__}: {error}" if error else ""


class IPCEngine(IPCWeightTransferEngine):
    """vLLM's CUDA IPC engine with digests; otherwise as `NCCLEngine`."""

    digesting = False

    def start_weight_update(self) -> None:
        super().start_weight_update()
        self.digests: dict[str, str] = {}

    def receive_weights(self, update_info: Any) -> None:
        with arriving(self):
            super().receive_weights(update_info)

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        forget_heads(self.model)
