"""One update being received: a thread that loads arriving tensors into a twin of the model, in two halves."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from rl.protocols import UpdateFailed
from rl.weights import digest
from rollout.weights.inbox import Inbox
from rollout.weights.twin import Twin


class StagedUpdate(threading.Thread):
    """Receives one version into a twin; the engine commits it or drops it."""

    def __init__(
        self,
        inbox: Inbox,
        threads: list[ThreadPoolExecutor],
        new_twin: Future[Twin],
        model_config: Any,
        version: int,
        digesting: bool,
    ) -> None:
        super().__init__(daemon=True, name=f"weights {version}")
        self.inbox, self.threads, self.new_twin, self.model_config = inbox, threads, new_twin, model_config
        self.version, self.digesting = version, digesting
        self.digests: dict[str, str] = {}
        self.twin: Twin | None = None
        self.split = LayerSplit()
        self.complete, self.wanted = False, True
        self.loading: list[tuple[str, Future[None]]] = []
        """The work of both threads, each part with the first tensor of its bucket."""
        self.start()

    def run(self) -> None:
        try:
            # The inbox has reported the error to the sender, or the connection is lost.
            with suppress(UpdateFailed):
                self.inbox.receive(self.version, self._begin, self._take, self._finish)
        finally:
            for _, loading in self.loading:
                loading.cancel()
            wait(loading for _, loading in self.loading)
            if self.twin and not (self.complete and self.wanted):
                self.twin.close()

    def drop(self) -> None:
        """Free the update: it will not be committed."""
        self.wanted = False
        if self.twin and not self.is_alive():
            self.twin.close()

    def commit(self) -> dict[str, str]:
        """Make the new weights the live ones; returns their digests, if `digesting`."""
        assert self.twin
        self.twin.commit()
        return self.digests

    def _begin(self) -> None:
        self.twin = self.new_twin.result()

    def _take(self, weights: list[tuple[str, Tensor]]) -> None:
        if self.digesting:
            self.digests |= {name: digest(tensor) for name, tensor in weights}
        # Copies and oneDNN's packing use one core each, and layers are independent: each thread loads its own layers,
        # and they meet at the end.
        for thread, half in zip(self.threads, self.split.halves(weights), strict=True):
            self.loading.append((weights[0][0], thread.submit(self._load, half)))

    @torch.no_grad()
    def _load(self, weights: list[tuple[str, Tensor]]) -> None:
        assert self.twin
        self.twin.load(weights)

    @torch.no_grad()
    def _finish(self) -> None:
        for name, loading in self.loading:
            try:
                loading.result()
            except Exception as error:  # any error: the sender waits for a report, with the bucket's name
                raise UpdateFailed(f"bucket from {name}: {type(error).__name__}: {error}") from error
        assert self.twin
        self.twin.finish(self.model_config)
        self.complete = True


class LayerSplit:
    """Which of two threads loads what: a new layer goes to the thread with fewer bytes so far, and stays there."""

    def __init__(self) -> None:
        self.thread_of: dict[str, int] = {}
        self.bytes = [0, 0]

    def halves(self, weights: list[tuple[str, Tensor]]) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
        """The tensors of each thread, in the order given. A tensor outside of the layers is a layer of its own."""
        halves: tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]] = ([], [])
        for name, tensor in weights:
            layer = next((part for part in name.split(".") if part.isdecimal()), name)
            thread = self.thread_of.setdefault(layer, int(self.bytes[0] > self.bytes[1]))
            self.bytes[thread] += tensor.nbytes
            halves[thread].append((name, tensor))
        return halves
