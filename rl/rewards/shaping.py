"""How a reward is shaped before it is paid: wrappers that take a reward function and are one.

A reward object may have a method `check(self, config)` that raises ValueError for settings that it cannot work with;
rl/validate.py calls it before anything starts.
"""

import inspect
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rl.rewards.combined import judges_groups
from rl.rewards.result import NOT_APPLICABLE, Score, Scored, points
from rl.rewards.score import Reward
from rl.typed import Checked
from rl.types import Reply

if TYPE_CHECKING:
    import rl.config


@dataclass(frozen=True, kw_only=True)
class SoftOverlong(Checked):
    """A reward with a soft punishment of long replies, as its part `overlong`.

    With n tokens, L = max_tokens and c = buffer: 0 up to L - c, then falling linearly to -penalty at L and beyond.
    Source: DAPO, arXiv 2503.14476, eq. 13.
    """

    reward: Reward
    """The reward that is shaped; it may be `async`."""
    max_tokens: int
    """The same as `rollout.max_tokens`."""
    buffer: int
    """Tokens before that limit over which the punishment grows."""
    penalty: float = 1.0
    """Largest punishment."""

    def __post_init__(self) -> None:
        if not 0 < self.buffer <= self.max_tokens:
            raise ValueError(f"buffer={self.buffer} must be above 0 and at most max_tokens={self.max_tokens}")
        if judges_groups(self.reward):
            raise ValueError(
                "SoftOverlong shapes the reward of one reply, and this one judges whole groups: write "
                "Weighted({'judge': OverGroup(...), 'short': SoftOverlong(reward=lambda reply: 0.0, ...)})"
            )

    def check(self, config: "rl.config.Config") -> None:
        """Punishment and cut must have one limit."""
        if self.max_tokens != config.rollout.max_tokens:
            raise ValueError(
                f"SoftOverlong(max_tokens={self.max_tokens}) punishes by another limit than "
                f"rollout.max_tokens={config.rollout.max_tokens}: give both the same"
            )

    def __call__(self, reply: Reply) -> Score | Awaitable[Score]:
        ask: Any = self.reward
        result = ask(reply)
        return self._later(result, reply) if inspect.isawaitable(result) else self._shaped(result, reply)

    async def _later(self, result: Awaitable[Score], reply: Reply) -> Score:
        return self._shaped(await result, reply)

    def _shaped(self, result: Score, reply: Reply) -> Score:
        reward, parts = points(result)
        if reward is None:
            return NOT_APPLICABLE
        over = len(reply.token_ids) - (self.max_tokens - self.buffer)
        overlong = {"overlong": -self.penalty * min(1.0, max(0, over) / self.buffer)}
        if isinstance(result, Scored):
            return Scored(reward=reward + overlong["overlong"], parts=parts | overlong)
        return (parts or {"task": reward}) | overlong
