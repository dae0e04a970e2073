"""The trainer's end of the weight channel: our own sender on CPU, vLLM's senders for NCCL and CUDA IPC."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from socket import socket
from threading import Thread
from time import perf_counter
from typing import Any

from torch import Tensor

from rl.weights import check_complete
from rollout.weights.channel import Layout, free_port, group_of, meeting_place, reserve, this_host
from rollout.weights.outbox import Outbox
from rollout.weights.protocols import Sender, Weights


class GlooSender:
    """Sends weights to engines on CPU. They receive while they sample; once all are ready, they pause to commit."""

    def __init__(
        self,
        *,
        weights: Weights,
        expected: set[str],
        client: Any,
        rank: int,
        address: str,
        world_size: int,
        timeout_s: float,
        listen: Callable[[str], socket] = free_port,
    ) -> None:
        """Connects to the engines. Raises TimeoutError when some engine does not connect in time.

        `expected`: the names that every update must contain. `client`: makes the control calls to all engines, and has
        the version of the next update. Rank 0 sends; the engines connect to it at `address`, where `listen` makes it
        listen. `world_size` counts rank 0 and every engine worker. `timeout_s` bounds each wait, in seconds.
        """
        self.weights, self.expected, self.client, self.timeout_s = weights, expected, client, timeout_s
        self.outbox: Outbox | None = None
        self.seconds: dict[str, float] = {}
        """Duration of the last update's phases: `begin` until the engines were ready to receive, `transfer` until they
        could read every byte, `stage` until all had built the new weights, `commit` until all sampled with them."""
        if rank == 0:
            self.outbox = self._connect(address, world_size, listen)

    def _connect(self, address: str, world_size: int, listen: Callable[[str], socket]) -> Outbox:
        layout = Layout.of(self.weights.metadata())
        layout = replace(layout, segment=reserve(sum(b[1] for b, _ in layout.buckets())), host=this_host())
        store = meeting_place(address, world_size, self.timeout_s, listen)
        info = {"master_address": address, "master_port": store.port, "rank_offset": 1, "world_size": world_size}
        info |= {"timeout_s": self.timeout_s, "layout": asdict(layout)}
        failed: list[Exception] = []

        def call() -> None:
            try:
                self.client.init_weight_transfer_engine(info)
            except Exception as error:  # raised again in the thread that waits
                failed.append(error)

        # A daemon thread, so that an engine that died in the rendezvous causes an error and not a hang.
        connecting = Thread(target=call, daemon=True, name="connect the engines")
        connecting.start()
        try:
            outbox = Outbox(group_of(store, 0, world_size, self.timeout_s), layout)
            connecting.join(self.timeout_s)
        except RuntimeError:
            if failed:
                # The engines' own error is more specific than a rendezvous timeout.
                raise failed[0] from None
            raise TimeoutError(
                f"the weight channel did not open within {self.timeout_s:g} s: not every engine connected to "
                f"{address}:{store.port}"
            ) from None
        finally:
            # Mapped memory remains valid, and no file is left behind, however this run ends.
            if layout.segment:
                Path(layout.segment).unlink()
        if failed:
            raise failed[0]
        return outbox

    def send_weights(self) -> None:
        """Send one update, from rank 0.

        Raises ValueError before anything is sent when a tensor is missing. Raises UpdateFailed when an engine refused
        the update; the engines then keep their current weights, and this sender cannot be used again.
        """
        check_complete({m.name for m in self.weights.metadata()}, self.expected, "the engine")
        tensors = iter(self.weights)
        try:
            if self.outbox is not None:
                self._send(self.outbox, tensors)
        finally:
            # Every rank takes part in gathering each layer; the other ranks would wait for this one.
            for _ in tensors:
                pass

    def close(self) -> None:
        """Leave the engines' group."""
        self.outbox = None

    def _send(self, outbox: Outbox, tensors: Iterator[tuple[str, Tensor]]) -> None:
        version = self.client.version
        began = perf_counter()
        self.client.stage_weights(version)
        ready = perf_counter()
        outbox.send(tensors, version)
        sent = perf_counter()
        outbox.finish()
        staged = perf_counter()
        self.client.finish_weight_update()
        self.seconds = {
            "begin": ready - began,
            "transfer": sent - ready,
            "stage": staged - sent,
            "commit": perf_counter() - staged,
        }


def open_sender(backend: str, **arguments: Any) -> Sender:
    """Connect to the engines and return the sender of the learner's weights; called on every learner rank.

    `arguments` are those of `GlooSender`. Raises ValueError for an unknown backend, and the errors of the rendezvous.
    """
    if backend == "gloo":
        return GlooSender(**arguments)
    if backend not in ("nccl", "ipc"):
        raise ValueError(f"unknown weight channel {backend!r}; known: ['gloo', 'ipc', 'nccl']")
    # Imported here because it imports vLLM, which a learner on CPU does not need.
    from rollout.weights.vllm_sender import open_vllm_sender

    return open_vllm_sender(backend, **arguments)
