"""Which group may be admitted, trained on, or must be dropped? The loop's rules as a state machine that never waits."""

from dataclasses import dataclass, field
from typing import Literal

from rl.loop.ledger import Ledger


@dataclass(kw_only=True)
class Admission:
    """Every group of a run, by its prompt's ordinal.

    At most (version + max_staleness + 1) * prompts_per_step groups are admitted in total, trained ones included. If
    they finish in order, none exceeds `max_staleness`. A group that is slower than later ones may become too old:
    `late="drop"` then drops it; `late="wait"` delays a step when skipping the slow groups would make some of them too
    old later.
    """

    prompts_per_step: int
    max_staleness: int
    steps: int
    late: Literal["drop", "wait"] = "drop"
    version: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    born: dict[int, int] = field(default_factory=dict)
    """Version at which each pending group was admitted, or admitted again: none of its tokens is older."""

    def room(self) -> bool:
        """Whether another group may be admitted."""
        steps = min(self.version + self.max_staleness + 1, self.steps)
        return self.ledger.pending() + self.ledger.count("trained") < steps * self.prompts_per_step

    def admit(self, ordinal: int) -> None:
        """A new group, to be sampled next."""
        assert self.room(), "no room: call room() first"
        self.ledger.admit(ordinal)
        self.born[ordinal] = self.version

    def move(self, ordinal: int, state: str) -> None:
        """A group's next state: `sampling`, `scoring`, `ready`, `admitted` again, or an end other than `trained`."""
        self.ledger.move(ordinal, state)
        if state == "admitted":
            self.born[ordinal] = self.version
        elif "(" in state:
            del self.born[ordinal]

    def step(self) -> list[int] | None:
        """The oldest ready groups of one step, or None while it cannot begin."""
        ready = [o for o in self.born if self.ledger.states[o] == "ready"]
        oldest = sorted(ready, key=lambda o: (self.born[o], o))[: self.prompts_per_step]
        if len(oldest) < self.prompts_per_step or (self.late == "wait" and self._too_many_without(oldest)):
            return None
        return oldest

    def _too_many_without(self, taken: list[int]) -> bool:
        """Whether more groups would be left over than the next steps can take before they are too old."""
        left = [born for ordinal, born in self.born.items() if ordinal not in taken]
        due = self.version - self.max_staleness
        return any(sum(b <= due + k for b in left) > k * self.prompts_per_step for k in range(self.max_staleness + 1))

    def train(self, ordinals: list[int]) -> None:
        """These groups go into a step."""
        for ordinal in ordinals:
            self.ledger.move(ordinal, "training")

    def publish(self) -> list[int]:
        """The engines now serve the step's weights as the next version.

        Returns the groups that are now too old, already moved to `filtered(too_old)`.
        """
        for ordinal in [o for o in self.born if self.ledger.states[o] == "training"]:
            self.ledger.move(ordinal, "trained")
            del self.born[ordinal]
        self.version += 1
        late = [o for o, born in self.born.items() if born < self.version - self.max_staleness]
        for ordinal in late:
            self.move(ordinal, "filtered(too_old)")
        return late
