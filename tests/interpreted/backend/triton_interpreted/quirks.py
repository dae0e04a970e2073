"""What stands in the way of Model Runner V2 on CPU; vLLM loads this as a general plugin in each of its processes.

The interpreter's `tl.range` yields plain ints, and vLLM's top-k/top-p kernel calls `.to` on one. And vLLM's CPU
platform switches asynchronous scheduling off, whatever was asked for.
"""

from collections.abc import Iterator
from typing import Any

from triton.runtime import interpreter


class Index(int):
    """An index that has `.to`, as a compiled one does."""

    def to(self, dtype: Any, **how: Any) -> int:
        return int(self)


def teach() -> None:
    """Let the ranges of interpreted kernels yield `Index`: a global of the module hides Python's own `range`."""
    vars(interpreter)["range"] = indices


def indices(*bounds: Any) -> Iterator[Index]:
    return map(Index, range(*bounds))


def keep_scheduling() -> None:
    """Let the CPU platform keep the scheduling that was asked for."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__

    def updated(cls: type, vllm_config: Any) -> None:
        asked = vllm_config.scheduler_config.async_scheduling
        update(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = asked

    CpuPlatform.check_and_update_config = classmethod(updated)
