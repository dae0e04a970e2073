"""The one quirk: the interpreter's `tl.range` yields plain ints, and vLLM's top-k/top-p kernel calls `.to` on one.

vLLM loads this as a general plugin in each of its processes.
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
