"""How a reward is shaped before it is paid: wrappers that take a reward function and are one."""

from collections.abc import Mapping
from dataclasses import dataclass

from rl.rewards.score import Reward
from rl.types import Reply


@dataclass(frozen=True, kw_only=True)
class SoftOverlong:
    """A reward with a soft punishment of long replies, as its part `overlong`.

    With n tokens, L = max_tokens and c = buffer: 0 up to L - c, then falling linearly to -penalty at L and beyond.
    Source: DAPO, arXiv 2503.14476, eq. 13.
    """

    reward: Reward
    max_tokens: int
    """As `rollout.max_tokens`."""
    buffer: int
    """Tokens before that limit over which the punishment grows."""
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.buffer <= self.max_tokens:
            raise ValueError(f"buffer={self.buffer} must be above 0 and at most max_tokens={self.max_tokens}")

    def __call__(self, reply: Reply) -> dict[str, float]:
        result = self.reward(reply)
        parts = dict(result) if isinstance(result, Mapping) else {"task": float(result)}
        over = len(reply.token_ids) - (self.max_tokens - self.buffer)
        return parts | {"overlong": -self.penalty * min(1.0, max(0, over) / self.buffer)}
