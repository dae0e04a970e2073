"""Where do environments live? One instance per episode, made and called through a host: threads here, or processes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

from rl.environments.threads import Threads, aside
from rl.environments.types import Episode, Turn
from rl.tools import MCP, methods
from rl.tools.mcp import server_of
from rl.types import Call

OPTIONAL = ("start", "parse", "reply", "close")
"""Methods that an environment may have."""
Work = Callable[[Any], Any]
"""Calls one method of an environment. It can be sent to another process."""


@runtime_checkable
class Instance(Protocol):
    """The environment of one episode."""

    @property
    def offers(self) -> frozenset[str]:
        """Which of the optional methods it has."""
        ...

    async def run(self, work: Work, seconds: float) -> Any:
        """What the work returns, awaited. Raises what it raises, and EnvLate after `seconds`."""
        ...

    async def close(self, seconds: float) -> None:
        """End it; the last call."""
        ...


@runtime_checkable
class Host(Protocol):
    """Makes environments."""

    async def make(self, task: Mapping[str, Any], seconds: float) -> Instance:
        """A new environment for a task. Raises as `Instance.run` does."""
        ...


@dataclass(kw_only=True)
class ThreadHost:
    """Environments in the driver's process."""

    env: Callable[[Mapping[str, Any]], Any]
    """Makes an environment of a task: its class."""
    threads: Threads = field(default_factory=Threads)

    async def make(self, task: Mapping[str, Any], seconds: float) -> Instance:
        """A new environment; its constructor runs in a thread. One that nobody waits for any more when it is made is
        closed."""
        return InThread(await self.threads.run(partial(self.env, task), seconds, abandoned), self.threads)


class InThread:
    """An environment in the driver's process."""

    def __init__(self, environment: Any, threads: Threads) -> None:
        self.environment, self.threads, self.offers = environment, threads, offered(environment)

    async def run(self, work: Work, seconds: float) -> Any:
        """What the work returns."""
        return await self.threads.run(partial(work, self.environment), seconds)

    async def close(self, seconds: float) -> None:
        """Call its `close`, where it has one."""
        if "close" in self.offers:
            await self.run(close, seconds)


def abandoned(environment: object) -> None:
    """Close an environment of an episode that has ended, if it has a `close`."""
    if "close" in offered(environment):
        aside(partial(close, environment))


def offered(environment: object) -> frozenset[str]:
    """Which of the optional methods an environment has."""
    return frozenset(name for name in OPTIONAL if callable(getattr(environment, name, None)))


def start(environment: Any) -> Any:
    """Its first messages."""
    return environment.start()


def parse(environment: Any, text: str) -> Any:
    """The calls in a text."""
    return environment.parse(text)


def use(environment: Any, call: Call, more: MCP | None = None) -> Any:
    """Make a tool call: of a method of the environment, or else of `more`. Raises ToolError for one that cannot be
    made."""
    if more and not methods.has(environment, call.name):
        return server_of(more).call(call)
    return methods.bind(environment, call)()


def reply(environment: Any, turn: Turn) -> Any:
    """Its answer to a turn without calls."""
    return environment.reply(turn)


def reward(environment: Any, episode: Episode) -> Any:
    """The reward of an episode."""
    return environment.reward(episode)


def close(environment: Any) -> Any:
    """Its end."""
    return environment.close()
