"""Typed handles of the actor processes: a remote call is written as an ordinary call, and pyright checks it as one.

`engine.ask(lambda e: e.sample(token_ids, 4, seed=0))` runs `Engine.sample` in the engine's process. The lambda gets a
recorder in place of the engine, which keeps name and arguments; the process replays them on the real object.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import ray

if TYPE_CHECKING:
    from ray import ObjectRef

    from rollout.engine import Engine
    from rollout.scorer import Scorer
    from trainer.learner.learner import Learner

R = TypeVar("R")
AskEngine = Callable[["Engine"], Awaitable[R]]
"""Calls one method of an engine."""
AskScorer = Callable[["Scorer"], Awaitable[R]]
"""Calls one method of the engine of a reward model."""
AskLearner = Callable[["Learner"], R]
"""Calls one method of a learner rank."""


@dataclass(frozen=True)
class Call:
    """One method call on its way to the process that hosts the object."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def on(self, hosted: object) -> Any:
        """Make the call."""
        return getattr(hosted, self.method)(*self.args, **self.kwargs)


class _Recorder:
    def __getattr__(self, method: str) -> Callable[..., Call]:
        return lambda *args, **kwargs: Call(method, args, kwargs)


def recorded(ask: Callable[[Any], Any]) -> Call:
    """The single call that `ask` makes."""
    call = ask(_Recorder())
    assert isinstance(call, Call), "a remote call is one call of one method, with values as arguments"
    return call


class Process:
    """One actor process, whatever it hosts (`trainer.cluster.actors`). It can be sent to other processes."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def build(self, target: str, sources: str, kwargs: dict[str, Any]) -> ObjectRef[None]:
        """Make the hosted object: `target` is "module:Class"."""
        return self.actor.build.remote(target, sources, kwargs)

    def gpus(self) -> ObjectRef[list[str]]:
        """The process's node, and its GPUs there."""
        return self.actor.gpus.remote()

    def stacks(self) -> ObjectRef[str]:
        """Where the process is now."""
        return self.actor.stacks.remote()

    def kill(self) -> None:
        """End the process at once."""
        ray.kill(self.actor)


class EngineProcess(Process):
    """The process of one engine."""

    def ask(self, ask: AskEngine[R]) -> ObjectRef[R]:
        """Call a method of the engine."""
        return self.actor.call.remote(recorded(ask))


class ScorerProcess(Process):
    """The process of a reward model."""

    def ask(self, ask: AskScorer[R]) -> ObjectRef[R]:
        """Call a method of its engine."""
        return self.actor.call.remote(recorded(ask))


class LearnerProcess(Process):
    """The process of one learner rank."""

    def ask(self, ask: AskLearner[R]) -> ObjectRef[R]:
        """Call a method of the learner."""
        return self.actor.call.remote(recorded(ask))

    @staticmethod
    def ask_all(ranks: list[LearnerProcess], ask: AskLearner[R]) -> list[ObjectRef[R]]:
        """Call a method on every rank. Its arguments, such as a batch, are written once for all of them."""
        call = ray.put(recorded(ask))
        return [rank.actor.call.remote(call) for rank in ranks]

    def listen(self) -> ObjectRef[tuple[str, int]]:
        """The node's address, and a port on which the process listens from now on."""
        return self.actor.listen.remote()

    def run(self, function: Callable[..., R], *args: Any) -> ObjectRef[R]:
        """Run a function there."""
        return self.actor.run.remote(function, *args)

    def preload(self, module: str) -> None:
        """Import a module while there is time. Returns at once."""
        self.actor.preload.remote(module)

    def connect(self, client: Any, channel: dict[str, Any]) -> ObjectRef[None]:
        """Open the weight channel to the engines of `client`."""
        return self.actor.connect.remote(client, channel)
