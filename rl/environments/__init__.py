"""What answers the policy: environments, their tools, and many turns as exact tokens. A recipe imports from here."""

from rl.environments.types import EnvError, Episode, Limits, Step, ToolError, Turn
from rl.types import Call

__all__ = ["Call", "EnvError", "Episode", "Limits", "Step", "ToolError", "Turn"]
