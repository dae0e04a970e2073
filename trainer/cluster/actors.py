"""The actor processes: each builds one engine or one learner rank, and calls its methods."""

import gc
import importlib
import socket
from typing import Any

import ray

from rl import checkout
from rollout.process import start_fork_server
from trainer.cluster.engine_client import EngineClient
from trainer.cluster.stacks import Heartbeat, stacks


class Host:
    """One actor process. Builds its object there, so that the driver imports neither vLLM nor DeepSpeed."""

    def __init__(self) -> None:
        self.heartbeat = Heartbeat()
        self.calls: set[Any] = set()  # coroutines under way

    def address(self) -> tuple[str, int]:
        """This node's address and a free port on it."""
        with socket.socket() as s:
            s.bind(("", 0))
            return ray.util.get_node_ip_address(), s.getsockname()[1]

    def preload(self, module: str) -> None:
        """Import what will be needed, while there is time."""
        importlib.import_module(module)

    def build(self, target: str, sources: str, kwargs: dict[str, Any]) -> None:
        """Make the hosted object: `target` is "module:Class". Raises ImportError when this node runs other code."""
        if checkout.digest() != sources:
            raise ImportError(
                f"node {socket.gethostname()} runs other sources of unison-rl ({checkout.ROOT}) than the driver: "
                "put the same checkout there, and leave it as it is while a run lasts"
            )
        module, name = target.split(":")
        # An import leaves no garbage, and looking for it takes a tenth of the time.
        gc.disable()
        hosted = getattr(importlib.import_module(module), name)
        gc.enable()
        self.object = hosted(**kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the hosted object."""
        result = getattr(self.object, method)(*args, **kwargs)
        self.heartbeat.beat(method)
        return result

    @ray.method(concurrency_group="watch")
    def stacks(self) -> str:
        """Where this process is, told by a thread of its own."""
        return f"{self.heartbeat}\n{stacks(list(self.calls))}"

    def connect(self, client: "EngineClient", **channel: Any) -> None:
        """On a learner rank: open the weight channel. Here, because only this file may hand rollout to trainer."""
        from rollout.weights.sender import open_sender

        weights, rank = self.object.weights, self.object.rank
        sender = open_sender(weights=weights, rank=rank, client=client, **channel)

        def send(version: int) -> None:
            client.version = version
            sender.send_weights()

        self.object.send = send


class AsyncHost(Host):
    """The same for an engine, whose methods are coroutines."""

    def build(self, target: str, sources: str, kwargs: dict[str, Any]) -> None:
        """Make the engine; on CPU vLLM is imported for its own process at the same time as here."""
        if kwargs["device"] == "cpu":
            start_fork_server()
        super().build(target, sources, kwargs)

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Await a method of the hosted object."""
        call = getattr(self.object, method)(*args, **kwargs)
        self.calls.add(call)
        try:
            result = await call
        finally:
            self.calls.discard(call)
        self.heartbeat.beat(method)
        return result


def actor_of(host: type) -> Any:
    """An actor class with a thread beside its work, which says where it is stuck."""
    return ray.remote(concurrency_groups={"watch": 1})(host)
