"""What does an agent get? The address of the policy, and the task of its episode."""

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rl.environments.check import takes
from rl.environments.types import Messages
from rl.typed import show


@dataclass(frozen=True, kw_only=True)
class Context:
    """One episode of an agent. Any client of OpenAI or Anthropic reaches the policy with `base_url` and `api_key`."""

    base_url: str
    """For `OpenAI(base_url=...)`, with /v1 at its end. It holds the episode's secret: nobody else may know it."""
    anthropic_url: str
    """For `Anthropic(base_url=...)`."""
    api_key: str
    """Any key is taken; this one is for clients that ask for one."""
    model: str
    """Name to ask for. Any name is taken."""
    task: Mapping[str, Any]
    """The example's."""
    messages: Messages
    """The example's prompt as chat messages."""
    seconds: float
    """`limits.seconds`: the time of the whole episode."""


Agent = Callable[[Context], Any | Awaitable[Any]]
"""Plays one episode and returns its reward, as a reward function does. It may be `async`."""


def check_agent(agent: Any) -> None:
    """Raise ValueError, with the line to write, for what is no agent."""
    if isinstance(agent, Sequence):
        if isinstance(agent, str) or not agent or not all(isinstance(word, str) for word in agent):
            raise ValueError(f"agent={show(agent)} must be a command as a list of words: agent=['python', 'mine.py']")
        return
    if inspect.isclass(agent) or not callable(agent) or not takes(agent, 1):
        raise ValueError(
            f"agent={show(agent)} must be a function of a context: write async def agent(ctx): ..., which uses "
            "ctx.base_url and returns the reward"
        )
