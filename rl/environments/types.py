"""What does an environment get, and what does it return? Limits, steps, turns, episodes and its kinds of errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rl.tools.errors import EnvError as EnvError
from rl.tools.errors import EnvLate as EnvLate
from rl.tools.errors import ToolError as ToolError
from rl.typed import Checked, show
from rl.types import Call

Ended = Literal["done", "turns", "length", "deadline"]
"""How an episode ended: by itself, or by `limits.turns`, a limit of tokens, or `limits.seconds`."""
Messages = list[dict[str, Any]]
"""Chat messages, such as [{"role": "user", "content": "What is 2 + 3?"}]."""


@dataclass(frozen=True, kw_only=True)
class Limits(Checked):
    """When an episode ends, and how long each call may take."""

    turns: int = 8
    """Most turns of the policy in one episode. After that it ended "turns"."""
    tokens: int | None = None
    """Most sampled tokens of one episode. After that it ended "length". Default: what rollout.max_model_len allows."""
    seconds: float = 600.0
    """Seconds of one episode from its start. After that it ended "deadline" if it waited for a tool that the policy
    called. If it waited for anything else, it is played again."""
    tool_s: float = 30.0
    """Seconds of one call of a tool, or of another method of the environment, from when it runs. A call that takes
    longer is an error of the environment, and the episode is played again. Work whose length the policy decides, such
    as its own program, needs a bound in the tool, which then raises ToolError."""

    def __post_init__(self) -> None:
        for name in ("turns", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"limits.{name}={value} must be at least 1")
        for name in ("seconds", "tool_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"limits.{name}={getattr(self, name):g} must be above 0")


@dataclass(frozen=True, kw_only=True)
class Step:
    """What `reply` returns: the environment's answer to a turn without tool calls."""

    observation: str | Messages = ""
    """What the policy reads next: the text of a user message, or messages."""
    reward: float = 0.0
    """Reward of this turn, paid at its last token. It is added to the episode's."""
    done: bool = False
    """Whether the episode ends here. Its observation is then not read by anybody."""

    def __post_init__(self) -> None:
        if not isinstance(self.observation, str | list):
            raise ValueError(f"Step: observation={show(self.observation)} must be text or a list of messages")
        if isinstance(self.reward, bool) or not isinstance(self.reward, int | float):
            raise ValueError(f"Step: reward={show(self.reward)} must be a number")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of the policy, and what came of it."""

    text: str
    """What it wrote; without reasoning and native tool calls, where the engine has parsers for them."""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    results: tuple[str, ...] = ()
    """What the policy reads as the result of each call; empty while the calls are made."""
    malformed: str = ""
    """Why a call in it could not be understood; empty if every call could."""
    finished: bool = True
    """Whether the policy ended the turn itself; False: a limit of tokens cut it off, and no call of it was made."""
    token_ids: list[int] = field(default_factory=list)
    reward: float = 0.0
    """What `reply` paid for this turn."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """What `reward` gets: a whole episode."""

    task: Mapping[str, Any]
    """The example's."""
    turns: Sequence[Turn]
    ended: Ended
    messages: Messages = field(default_factory=list)
    """The conversation with the prompt."""

    @property
    def text(self) -> str:
        """The text of the last turn; empty without a turn."""
        return self.turns[-1].text if self.turns else ""
