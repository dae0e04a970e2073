"""In which state is every prompt? Each ordinal of the stream is in exactly one, and only known moves are allowed."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

NEXT = {
    "admitted": {"sampling", "filtered"},
    "sampling": {"scoring", "admitted", "filtered", "failed"},
    "scoring": {"ready", "filtered", "failed"},
    "ready": {"training", "filtered"},
    "training": {"trained"},
}
"""The states that may follow each state. A group moves back from sampling to admitted when its engine was lost. All
other states are ends: `trained`, `filtered(reason)` and `failed(reason)`."""


Moved = Callable[[int, str], None]
"""Hears of an ordinal's new state."""


@dataclass
class Ledger:
    """States by ordinal, and how many prompts are in each."""

    states: dict[int, str] = field(default_factory=dict[int, str])
    counts: Counter[str] = field(default_factory=Counter[str])
    moved: Moved = field(default=lambda ordinal, state: None, compare=False)

    def admit(self, ordinal: int) -> None:
        """A prompt leaves the stream; it must be new."""
        assert ordinal not in self.states, f"prompt {ordinal} was admitted twice"
        self.states[ordinal] = "admitted"
        self.counts["admitted"] += 1
        self.moved(ordinal, "admitted")

    def move(self, ordinal: int, state: str) -> None:
        """A prompt moves to its next state."""
        before = self.states.get(ordinal, "unknown")
        assert state.partition("(")[0] in NEXT.get(before, ()), f"prompt {ordinal} is {before}, not yet {state}"
        self.states[ordinal] = state
        self.counts[before] -= 1
        self.counts[state] += 1
        self.moved(ordinal, state)

    def count(self, *states: str) -> int:
        """Prompts in any of these states."""
        return sum(self.counts[state] for state in states)

    def pending(self) -> int:
        """Prompts that have not reached an end."""
        return self.count(*NEXT)

    def summary(self) -> dict[str, int]:
        """Prompts by end, and those that are pending; the sum is all prompts ever taken from the stream."""
        return {"pending": self.pending()} | {s: n for s, n in self.counts.items() if s not in NEXT}
