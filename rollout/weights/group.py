"""The NCCL group of learner and engines: how they meet, can it move anything, and who ends it when a peer fails?"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from socket import socket
from typing import Any, TypeVar

import torch
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.utils import StatelessProcessGroup
from vllm.utils.nccl import unpinned_nccl_env

from rl.protocols import UpdateFailed

T = TypeVar("T")
ABORTED = "unison/aborted"
"""The key that tells every member of a group, in the store where they met, that one of them has aborted it."""
LOOK_S = 0.1
"""Seconds between two looks of the thread that watches a transfer."""
SPARE_S = 2.0
"""Seconds that a transfer may go on after a peer's error: a peer that takes the rest in spite of it lets it end."""


def in_thread(call: Callable[[], T], name: str) -> "Future[T]":
    """Call in a daemon thread. One that waits for ever, as NCCL may, keeps no process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised again where the result is read
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name=name).start()
    return future


def join(
    address: str, port: int, rank: int, world_size: int, timeout_s: float, device: int, listener: socket | None = None
) -> PyNcclCommunicator:
    """Join a group at rank 0's address, where `listener` may listen already.

    Rank 0 is found within `timeout_s`. From then on NCCL waits for all ranks without a limit, so the caller watches.
    """
    meeting = StatelessProcessGroup.create(
        address, port, rank, world_size, store_timeout=max(1, int(timeout_s)), listen_socket=listener
    )
    with unpinned_nccl_env(), torch.accelerator.device_index(device):
        group = PyNcclCommunicator(meeting, device=device)
    check_usable(group)
    return group


def check_usable(group: Any) -> None:
    """Raise RuntimeError if a `PyNcclCommunicator` was switched off, did not load, or was aborted.

    Every broadcast of such a group returns at once, and the receivers would load memory that nobody wrote.
    """
    if not group.available or group.disabled:
        raise RuntimeError(
            "NCCL is not available to vLLM in this process, so weights cannot travel: unset VLLM_DISABLE_PYNCCL, and "
            "see that libnccl loads (VLLM_NCCL_SO_PATH names another library)"
        )


@contextmanager
def watched(group: Any, timeout_s: float, lost: Callable[[], BaseException | None] = lambda: None) -> Iterator[None]:
    """Abort the group when a transfer in this block cannot end: NCCL itself would wait for ever.

    It cannot after `timeout_s`, after another member's abort, and `SPARE_S` after a peer's error, which `lost` returns.
    Raises UpdateFailed where the group was aborted, with that error as its cause.
    """
    done, until = threading.Event(), time.monotonic() + timeout_s
    cause: list[BaseException | None] = []

    def watch() -> None:
        limit = until
        while not done.wait(LOOK_S):
            cause[:] = [lost()]
            if cause[0]:
                limit = min(limit, time.monotonic() + SPARE_S)
            if time.monotonic() > limit or _aborted(group):
                abort(group)
                break

    watching = in_thread(watch, "watch a weight transfer")
    try:
        yield
    finally:
        done.set()
        watching.result()
    if group.disabled:
        late = f"it did not end within {timeout_s:g} s" if time.monotonic() > until else "another member aborted it"
        why = cause[0] if cause and cause[0] else late
        raise UpdateFailed(f"the weight transfer was aborted: {why}") from (cause[0] if cause else None)


def abort(group: Any) -> None:
    """End whatever this group is doing, on all members. It cannot be used again."""
    # Disabled first: the aborted broadcast returns while NCCL still frees the group, and the next one would use it.
    group.disabled = True
    with suppress(RuntimeError):  # the member that keeps the store may be gone
        group.group.store.set(ABORTED, "1")
    with torch.accelerator.device_index(group.device.index):
        group.nccl.ncclCommAbort(group.comm)


def leave(joining: "Future[Any]") -> None:
    """Free the group that was joined. A callback of its future, for where it is joined too late."""
    if not joining.exception():
        joining.result().destroy()


def _aborted(group: Any) -> bool:
    try:
        return group.group.store.check([ABORTED])
    except RuntimeError:  # the member that keeps it is gone
        return True
