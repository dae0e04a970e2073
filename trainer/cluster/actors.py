"""The actor processes: each builds one engine or one learner rank, and calls its methods."""

import gc
import importlib
import os
import socket
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from rl import checkout
from trainer.cluster.nodes.code import on_this_node
from trainer.cluster.stacks import Heartbeat, stacks
from trainer.cluster.stubs import Call, EngineProcess, LearnerProcess, ScorerProcess
from trainer.node.ports import listener

if TYPE_CHECKING:
    from trainer.cluster.engine_client import EngineClient

R = TypeVar("R")


class ActorShell:
    """One actor process. It builds its object itself, so that the driver imports neither vLLM nor DeepSpeed."""

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        # Here and not by Ray, which would start Python twice for it.
        os.environ.update(env or {})
        self.heartbeat = Heartbeat()
        self.calls: set[Any] = set()
        """Coroutines that are running."""

    def build(self, target: str, sources: str, kwargs: dict[str, Any]) -> None:
        """Make the hosted object: `target` is "module:Class". Raises ImportError when this node has other sources."""
        if checkout.digest() != sources:
            raise ImportError(
                f"node {socket.gethostname()} runs other sources of unison-rl ({checkout.ROOT}) than the driver: "
                "put the same checkout there, and do not change it during a run"
            )
        if (revision := kwargs.pop("revision", None)) is not None:
            kwargs["model"] = on_this_node(kwargs["model"], revision)
        module, name = target.split(":")
        # An import leaves no garbage, and each search through all that it made takes half a second; vLLM makes three.
        gc.disable()
        hosted = getattr(importlib.import_module(module), name)
        gc.freeze()
        gc.enable()
        # OpenMP has another number where LD_PRELOAD or a site's own start of Python loaded it before.
        threads = int(os.environ.get("OMP_NUM_THREADS", 0))
        if threads and (torch := sys.modules.get("torch")) and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        self.object = hosted(**kwargs)

    @ray.method(concurrency_group="watch")
    def gpus(self) -> list[str]:
        """This process's node, and its GPUs there."""
        context = ray.get_runtime_context()
        return [context.get_node_id(), *context.get_accelerator_ids()["GPU"]]

    @ray.method(concurrency_group="watch")
    def stacks(self) -> str:
        """The stacks of this process; a thread of its own answers."""
        return f"{self.heartbeat}\n{stacks(list(self.calls))}"


class LearnerActor(ActorShell):
    """The process of one learner rank."""

    listener: socket.socket | None = None
    sender: Any = None
    """The learner's end of the open weight channel."""

    def listen(self) -> tuple[str, int]:
        """This node's address, and a port on which this rank listens already: no other process can take it."""
        address = ray.util.get_node_ip_address()
        self.listener = listener(address)
        return address, self.listener.getsockname()[1]

    def build(self, target: str, sources: str, kwargs: dict[str, Any]) -> None:
        """Make the rank. The ranks meet at the one that listens."""
        descriptor = self.listener.detach() if self.listener else None
        super().build(target, sources, kwargs | {"listener": descriptor})

    def run(self, function: Callable[..., R], *args: Any) -> R:
        """Run a function of ours in this process, before the rank is made."""
        return function(*args)

    def preload(self, module: str) -> None:
        """Import what will be needed, while there is time."""
        importlib.import_module(module)

    def call(self, call: Call) -> Any:
        """Make a call on the learner."""
        result = call.on(self.object)
        self.heartbeat.beat(call.method)
        return result

    def connect(self, client: "EngineClient", channel: dict[str, Any]) -> None:
        """Open the weight channel, in place of one before. Only this wing may hand rollout's sender to a learner."""
        from rollout.weights.sender import open_sender

        if self.sender is not None:
            self.sender.close()
        weights, rank = self.object.weights, self.object.rank
        self.sender = sender = open_sender(weights=weights, rank=rank, client=client, listen=listener, **channel)

        class Channel:
            def send(self, version: int) -> None:
                client.version = version
                sender.send_weights()

        self.object.connect(Channel())


class EngineActor(ActorShell):
    """The process of one engine, whose methods are coroutines."""

    async def call(self, call: Call) -> Any:
        """Await a call on the engine."""
        running = call.on(self.object)
        self.calls.add(running)
        try:
            result = await running
        finally:
            self.calls.discard(running)
        self.heartbeat.beat(call.method)
        return result


class ScorerActor(EngineActor):
    """The process of a reward model's engine."""


def _started(shell: type, options: dict[str, Any], env: Mapping[str, str]) -> Any:
    # Where Ray sets an environment anyway, it sets all of it, before anything reads it.
    if "runtime_env" in options:
        options = options | {"runtime_env": {"env_vars": options["runtime_env"]["env_vars"] | env}}
    return watched(shell).options(**options).remote(env)


def engine_process(options: dict[str, Any], env: Mapping[str, str]) -> EngineProcess:
    """Start the process of an engine, with Ray's options for actors and this environment. Returns at once."""
    return EngineProcess(_started(EngineActor, options, env))


def scorer_process(options: dict[str, Any], env: Mapping[str, str]) -> ScorerProcess:
    """Start the process of a reward model, with Ray's options for actors and this environment. Returns at once."""
    return ScorerProcess(_started(ScorerActor, options, env))


def learner_process(options: dict[str, Any], env: Mapping[str, str]) -> LearnerProcess:
    """Start the process of a learner rank, with Ray's options for actors and this environment. Returns at once."""
    return LearnerProcess(_started(LearnerActor, options, env))


def watched(shell: type) -> Any:
    """The actor class, with a thread next to its work that reports where it is stuck."""
    return ray.remote(concurrency_groups={"watch": 1})(shell)  # pyright: ignore[reportCallIssue]
