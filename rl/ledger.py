"""Where is every prompt? Each ordinal of the stream is in exactly one state."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Ledger:
    """States by ordinal: `pending`, `trained`, `filtered(reason)` or `failed(reason)`; and how many are in each."""

    states: dict[int, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def admit(self, ordinal: int) -> None:
        """A prompt leaves the stream; it must be new."""
        assert ordinal not in self.states, f"prompt {ordinal} was admitted twice"
        self.states[ordinal] = "pending"
        self.counts["pending"] += 1

    def settle(self, ordinal: int, state: str) -> None:
        """A pending prompt reaches its end."""
        assert self.states.get(ordinal) == "pending", f"prompt {ordinal} is {self.states.get(ordinal)}, now {state}"
        self.states[ordinal] = state
        self.counts["pending"] -= 1
        self.counts[state] += 1
