"""The trainer's end of the weight channel: ours between CPU processes, vLLM's trainer engines for NCCL and CUDA IPC."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any, Protocol

from torch import Tensor

from rl.weights import TensorMeta, check_complete
from rollout.weights.channel import Layout, join, reserve, this_host
from rollout.weights.outbox import Outbox


class Weights(Protocol):
    """What the learner offers: names ahead of time, then full tensors in that order (a collective over its ranks)."""

    def metadata(self) -> list[TensorMeta]: ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


class Sender(Protocol):
    """Gives every engine the learner's weights of now, as the version that the client was told; on every rank."""

    def send_weights(self) -> None: ...


class GlooSender:
    """Weights to engines on CPU. They receive while they sample, and pause to commit, once all of them are ready."""

    def __init__(
        self,
        *,
        weights: Weights,
        expected: set[str],
        client: Any,
        rank: int,
        address: str,
        port: int,
        world_size: int,
        timeout_s: float,
    ) -> None:
        """`expected` are the names that every update must bring; `client` carries the control calls to all engines, and
        the version of the next update; rank 0 sends, and is found at `address` and `port`; `world_size` counts it and
        every engine worker; `timeout_s` bounds each wait, in seconds. Raises TimeoutError when not all engines come."""
        self.weights, self.expected, self.client, self.timeout_s = weights, expected, client, timeout_s
        self.outbox: Outbox | None = None
        self.seconds: dict[str, float] = {}
        """Of the last update: `transfer` until the engines could read every byte, `stage` until all had the new
        weights built, `commit` until all sampled with them."""
        if rank == 0:
            self.outbox = self._meet(address, port, world_size)

    def _meet(self, address: str, port: int, world_size: int) -> Outbox:
        layout = Layout.of(self.weights.metadata())
        layout = replace(layout, segment=reserve(sum(b[1] for b, _ in layout.buckets())), host=this_host())
        info = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": world_size}
        info |= {"timeout_s": self.timeout_s, "layout": asdict(layout)}
        failed: list[Exception] = []

        def call() -> None:
            try:
                self.client.init_weight_transfer_engine(info)
            except Exception as error:  # handed over: it is raised in the thread that waits
                failed.append(error)

        # A daemon: an engine that died in the rendezvous must not turn its error into a hang.
        meeting = Thread(target=call, daemon=True, name="meet the engines")
        meeting.start()
        try:
            outbox = Outbox(join(address, port, 0, world_size, self.timeout_s), layout)
            meeting.join(self.timeout_s)
        except RuntimeError:
            if failed:
                # The engines' own error says more than a rendezvous without them.
                raise failed[0] from None
            late = f"no weight channel within {self.timeout_s:g} s: not every engine came to {address}:{port}"
            raise TimeoutError(late) from None
        finally:
            # What is mapped stays; no name is left behind, however this run ends.
            if layout.segment:
                Path(layout.segment).unlink()
        if failed:
            raise failed[0]
        return outbox

    def send_weights(self) -> None:
        """Raises ValueError before anything is sent when a tensor is missing, and UpdateFailed when the engines did not
        take the update: they then go on with the weights they have, and this sender is of no more use."""
        check_complete({m.name for m in self.weights.metadata()}, self.expected, "the engine")
        tensors = iter(self.weights)
        try:
            if self.outbox is not None:
                self._send(self.outbox, tensors)
        finally:
            # The other ranks gather each layer together with this one, and would wait for it.
            for _ in tensors:
                pass

    def _send(self, outbox: Outbox, tensors: Iterator[tuple[str, Tensor]]) -> None:
        version = self.client.version
        began = perf_counter()
        self.client.stage_weights(version)
        asked = perf_counter()
        outbox.send(tensors, version)
        sent = perf_counter()
        outbox.settle()
        staged = perf_counter()
        self.client.finish_weight_update()
        self.seconds = {
            "begin": asked - began,
            "transfer": sent - asked,
            "stage": staged - sent,
            "commit": perf_counter() - staged,
        }


def open_sender(backend: str, **ends: Any) -> Sender:
    """Meet the engines and return what sends them the learner's weights; called on every learner rank.

    `ends` are the arguments of `GlooSender`. Raises ValueError for an unknown backend, and whatever the rendezvous
    raises.
    """
    if backend == "gloo":
        return GlooSender(**ends)
    if backend not in ("nccl", "ipc"):
        raise ValueError(f"unknown weight channel {backend!r}; known: ['gloo', 'ipc', 'nccl']")
    # Here, for it imports vLLM, which a learner on CPU can do without.
    from rollout.weights.vllm_sender import open_vllm_sender

    return open_vllm_sender(backend, **ends)
