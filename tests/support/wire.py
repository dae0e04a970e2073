"""Both ends of a weight channel in one process, and what can go wrong on the way between them."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from rl.protocols import UpdateFailed
from rl.weights import TensorMeta
from rollout.weights.channel import Layout, group_of, join, meeting_place, reserve, this_host
from rollout.weights.inbox import Inbox
from rollout.weights.outbox import Outbox


class Receiver:
    """Holds the last update that came whole, with its version, as an engine does."""

    def __init__(self) -> None:
        self.version, self.tensors = -1, {}
        self.inbox: Inbox | None = None
        self.staged: dict[str, Tensor] = {}

    def receive(self, version: int) -> None:
        assert self.inbox is not None
        self.inbox.receive(version, self.staged.clear, self._take, lambda: None)
        self.version, self.tensors = version, dict(self.staged)

    def _take(self, named: list[tuple[str, Tensor]]) -> None:
        self.staged |= {name: tensor.clone() for name, tensor in named}


class Wire:
    """A channel to `receivers`; `shared` says whether they share memory with the sender."""

    def __init__(self, tensors: dict[str, Tensor], receivers: list[Receiver], shared: bool, timeout_s: float = 20):
        metas = [TensorMeta(name=n, dtype=str(t.dtype)[6:], shape=tuple(t.shape)) for n, t in tensors.items()]
        layout = Layout.of(metas)
        if shared:
            layout = replace(layout, segment=reserve(sum(b[1] for b, _ in layout.buckets())), host=this_host())
        self.receivers = receivers

        size = 1 + len(receivers)
        store = meeting_place("127.0.0.1", size, timeout_s)

        def meet(rank: int) -> None:
            receivers[rank - 1].inbox = Inbox(join("127.0.0.1", store.port, rank, size, timeout_s), layout)

        meeting = [Thread(target=meet, args=(rank,)) for rank in range(1, size)]
        for thread in meeting:
            thread.start()
        self.outbox = Outbox(group_of(store, 0, size, timeout_s), layout)
        for thread in meeting:
            thread.join()

    def send(self, tensors: dict[str, Tensor], version: int) -> list[str]:
        """One update; returns what each receiver raised ("" for nothing). Raises what the sender does."""
        said = [""] * len(self.receivers)

        def listen(index: int) -> None:
            try:
                self.receivers[index].receive(version)
            except (UpdateFailed, RuntimeError) as error:
                said[index] = str(error)

        listening = [Thread(target=listen, args=(i,)) for i in range(len(self.receivers))]
        for thread in listening:
            thread.start()
        try:
            self.outbox.send(iter(tensors.items()), version)
            self.outbox.finish()
        finally:
            for thread in listening:
                thread.join()
        return said


Tell = Callable[[int, int | None, int, Tensor], None]


def dropped(tell: Tell, calls: list[Any]) -> None:
    """The second bucket never leaves."""
    for n, call in enumerate(calls):
        if n != 1:
            tell(*call)


def doubled(tell: Tell, calls: list[Any]) -> None:
    for n, call in enumerate(calls):
        for _ in range(2 if n == 1 else 1):
            tell(*call)


def reordered(tell: Tell, calls: list[Any]) -> None:
    calls[0], calls[1] = calls[1], calls[0]
    for call in calls:
        tell(*call)


def delayed(tell: Tell, calls: list[Any]) -> None:
    for call in calls:
        time.sleep(0.1)
        tell(*call)


def corrupted(tell: Tell, calls: list[Any]) -> None:
    """A bit of the first bucket changes after the sender wrote it and before it is summed."""
    for n, (index, base, encoding, payload) in enumerate(calls):
        if n == 0:
            payload[len(payload) // 2] ^= 4
        tell(index, base, encoding, payload)


FAULTS = {"drop": dropped, "duplicate": doubled, "reorder": reordered, "delay": delayed, "corrupt": corrupted}


def with_fault(outbox: Outbox, fault: Callable[[Tell, list[Any]], None]) -> Callable[[], None]:
    """From now on the outbox's buckets meet the fault, until what is returned is called. The end mark passes."""
    tell, calls = outbox._send_bucket, []

    def hold(index: int, base: int | None, encoding: int, payload: Tensor) -> None:
        if index >= 0:
            calls.append((index, base, encoding, payload.clone()))
            return
        fault(tell, calls)
        tell(index, base, encoding, payload)

    outbox._send_bucket = hold

    def mend() -> None:
        outbox._send_bucket = tell

    return mend


def steps(seed: int, lr: float = 1e-4) -> Iterator[dict[str, Tensor]]:
    """bf16 weights of a small network after each real AdamW step on fp32 masters, beginning with the start."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (300, 64), "layer.0.up": (64, 256), "layer.0.down": (256, 64), "norm": (64,), "head": (64, 300)}
    masters = {n: (torch.randn(s, generator=generator) * 0.05).requires_grad_() for n, s in shapes.items()}
    adam = torch.optim.AdamW(masters.values(), lr=lr)
    while True:
        yield {name: master.detach().bfloat16() for name, master in masters.items()}
        ids = torch.randint(0, 300, (64,), generator=generator)
        x = torch.nn.functional.rms_norm(masters["embed"][ids], (64,), 1 + masters["norm"])
        x = x + torch.relu(x @ masters["layer.0.up"]) @ masters["layer.0.down"]
        torch.nn.functional.cross_entropy(x @ masters["head"], ids.roll(1)).backward()
        adam.step()
        adam.zero_grad()
