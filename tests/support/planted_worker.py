"""How does a planted fault reach the engine's process? A module-level context manager runs there until it is undone.

The engine's process imports this module as its worker extension. A fault is a function of the worker:

    @contextmanager
    def wrong_scale(worker, factor): ...

and `with in_engine(live, wrong_scale, 1.05):` runs it there.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

from live import Live
from rollout.head import forget_heads
from rollout.worker import WorkerExtension


class ExamExtension(WorkerExtension):
    """The worker's side: a stack of faults."""

    def enter_fault(self, module: str, name: str, args: list[Any]) -> None:
        """Plant one more fault."""
        if not hasattr(self, "planted"):
            self.planted: list[ExitStack] = []
        one = ExitStack()
        one.enter_context(getattr(import_module(module), name)(self, *args))
        renew(self)
        self.planted.append(one)

    def leave_fault(self) -> None:
        """Undo the last one."""
        self.planted.pop().close()
        renew(self)


def renew(worker: Any) -> None:
    """Forget what was computed or prepared from the model: a cached head, and the twin that is ready for the next
    update, which holds the buffers of before."""
    forget_heads(model_of(worker))
    worker.weight_transfer_engine.spare = None


@contextmanager
def in_engine(live: Live, fault: Callable[..., Any], *args: Any) -> Iterator[None]:
    """A fault inside the engine's worker process."""
    where: Any = fault
    live.wait(live.engine.llm.collective_rpc("enter_fault", args=(where.__module__, where.__name__, list(args))))
    try:
        yield
    finally:
        live.wait(live.engine.llm.collective_rpc("leave_fault"))


def model_of(worker: Any) -> Any:
    """vLLM's model."""
    return worker.weight_transfer_engine.model


def named(worker: Any, ending: str) -> list[Any]:
    """The modules whose name ends so, in the model's order, each once."""
    return [module for name, module in model_of(worker).named_modules() if name.split(".")[-1] == ending]


@contextmanager
def wrapped(module: Any, method: str, change: Callable[..., Any]) -> Iterator[None]:
    """`module.method(...)` becomes `change(the method as it was, ...)`."""
    one = getattr(module, method)

    def changed(*args: Any, **kwargs: Any) -> Any:
        return change(one, *args, **kwargs)

    with patch.object(module, method, changed):
        yield


@contextmanager
def every(modules: list[Any], method: str, change: Callable[..., Any]) -> Iterator[None]:
    """The same for all of these modules."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(wrapped(module, method, change))
        yield
