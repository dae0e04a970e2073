"""vLLM's own trainer engines as senders: NCCL between GPUs, CUDA IPC on one GPU."""

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import asdict
from functools import partial
from socket import socket
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine, NCCLWeightTransferUpdateInfo

from rl.protocols import UpdateFailed
from rl.weights import SMALLEST_BUFFER, check_complete
from rollout.weights.channel import free_port
from rollout.weights.group import check_usable, in_thread, join, leave, watched
from rollout.weights.protocols import Weights


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


class NCCLSender(NCCLTrainerWeightTransferEngine):
    """vLLM's NCCL sender, in which no engine's failure is a hang: every wait ends, and every error arrives."""

    joining: Future[Any] | None = None
    """The group, once this rank has joined it."""

    def connect(
        self, address: str, world_size: int, timeout_s: float, listen: Callable[[str], socket] = free_port
    ) -> None:
        """Meet the engines. Raises what an engine raised, or TimeoutError when not all have come in time."""
        self.timeout_s = timeout_s
        listener = listen(address)
        port = listener.getsockname()[1]
        info = NCCLWeightTransferInitInfo(
            master_address=address,
            master_port=port,
            rank_offset=1,
            world_size=world_size,
            packed=self.packed,
            packed_buffer_size_bytes=self.packed_buffer_size_bytes,
            packed_num_buffers=self.packed_num_buffers,
        )
        device = torch.accelerator.current_device_index()
        # In a thread, because NCCL waits for ever for an engine that does not come, and because vLLM's communicator
        # makes a new CUDA stream the current one of its thread.
        own = in_thread(partial(join, address, port, 0, world_size, timeout_s, device, listener), "join the engines")
        told = worker_init_payload(info) | {"timeout_s": timeout_s}
        theirs = in_thread(partial(self.client.init_weight_transfer_engine, told), "connect the engines")
        self.joining = own
        ended, late = wait([theirs, own], timeout_s, FIRST_EXCEPTION)
        try:
            for one in (theirs, own):
                if one in ended:
                    one.result()
            if late:
                raise TimeoutError(
                    f"the weight channel did not open within {timeout_s:g} s: not every engine connected to "
                    f"{address}:{port}"
                )
        except BaseException:
            self.shutdown()
            raise
        self.model_update_group = own.result()

    def shutdown(self) -> None:
        """Leave the engines' group."""
        if self.joining is not None:
            self.joining.add_done_callback(leave)
        self.joining = self.model_update_group = None

    def send_weights(self) -> None:
        """Send one update. The engines that received all of it commit, also where another one failed.

        Raises the error of an engine, or UpdateFailed. After an abort this sender cannot be used again.
        """
        if not self.is_sender:
            super().send_weights()
            return
        assert self.source is not None, "open_vllm_sender sets it"
        meta = self.source.metadata()
        check_usable(self.model_update_group)
        info = NCCLWeightTransferUpdateInfo(
            [m.name for m in meta], [str(m.dtype).removeprefix("torch.") for m in meta], [list(m.shape) for m in meta]
        )
        self.client.start_weight_update()
        receiving = in_thread(partial(self.client.update_weights, asdict(info)), "engines receive")
        try:
            with watched(
                self.model_update_group, self.timeout_s, lambda: receiving.exception() if receiving.done() else None
            ):
                self._broadcast(self.source, meta)
            receiving.result()
        except Exception as error:
            client: Any = self.client
            client.finish_received()
            if isinstance(error, UpdateFailed) and error.__cause__:
                raise error.__cause__ from None
            raise
        self.client.finish_weight_update()
        self._post_send_sync()


class IPCSender(IPCTrainerWeightTransferEngine):
    """vLLM's IPC sender. Ranks share the handles of every part, so an engine's failure is raised after the last one."""

    def send_weights(self) -> None:
        """Send one update. Raises the error of an engine; the others commit."""
        super().send_weights()
        if self.is_sender:
            client: Any = self.client
            client.raise_failed()


class DrainingSender:
    """A sender through vLLM. However an update ends, this rank takes part in gathering every tensor, because the other
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

    def close(self) -> None:
        """Leave the engines' group."""
        self.sender.shutdown()


def open_vllm_sender(
    backend: str, *, weights: Weights, expected: set[str], client: Any, rank: int, timeout_s: float, **where: Any
) -> DrainingSender:
    """`rollout.weights.sender.open_sender` for "nccl" and "ipc".

    Raises RuntimeError where NCCL is switched off or did not load: every broadcast would then do nothing.
    """
    source = Source(weights, expected)
    if backend == "nccl":
        sender = NCCLSender(client=client, source=source, is_sender=rank == 0, packed_buffer_size_bytes=SMALLEST_BUFFER)
        if rank == 0:
            sender.connect(timeout_s=timeout_s, **where)
        return DrainingSender(sender, source)
    largest = max(m.nbytes for m in weights.metadata())
    info = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=max(SMALLEST_BUFFER, largest))
    return DrainingSender(IPCSender.trainer_init(info, client=client, source=source), source)
