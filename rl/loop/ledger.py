"""Where is every prompt? Each ordinal of the stream is in exactly one state, and moves along known ways only."""

from collections import Counter
from dataclasses import dataclass, field

NEXT = {
    "admitted": {"sampling", "filtered"},
    "sampling": {"scoring", "admitted", "filtered", "failed"},
    "scoring": {"ready", "filtered"},
    "ready": {"training", "filtered"},
    "training": {"trained"},
}
"""Where a state may lead. A group goes back from sampling to admitted when its engine was lost. The others are ends:
`trained`, `filtered(reason)` and `failed(reason)`."""


@dataclass
class Ledger:
    """States by ordinal, and how many prompts are in each."""

    states: dict[int, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def admit(self, ordinal: int) -> None:
        """A prompt leaves the stream; it must be new."""
        assert ordinal not in self.states, f"prompt {ordinal} was admitted twice"
        self.states[ordinal] = "admitted"
        self.counts["admitted"] += 1

    def move(self, ordinal: int, state: str) -> None:
        """A prompt goes on to its next state."""
        before = self.states.get(ordinal, "unknown")
        assert state.partition("(")[0] in NEXT.get(before, ()), f"prompt {ordinal} is {before}, and now {state}?"
        self.states[ordinal] = state
        self.counts[before] -= 1
        self.counts[state] += 1

    def count(self, *states: str) -> int:
        """Prompts in any of these states."""
        return sum(self.counts[state] for state in states)

    def pending(self) -> int:
        """Prompts that have not reached an end."""
        return self.count(*NEXT)

    def summary(self) -> dict[str, int]:
        """Prompts by end, and those that are pending; the sum is all prompts ever taken from the stream."""
        return {"pending": self.pending()} | {s: n for s, n in self.counts.items() if s not in NEXT}
