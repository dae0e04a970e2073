"""What does a checkpoint keep of the loop? The steps done, and the end of every prompt of the stream."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rl.loop.ledger import NEXT, Ledger
from rl.types import Prompt


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A loop between two steps.

    A prompt without an end is pending. The resumed loop samples its group again, finished or not, under the same
    ordinal and with the same seeds: no prompt is lost, and none is trained on twice.
    """

    version: int = 0
    """Steps done, which is the weight version that the engines serve."""
    trained_tokens: int = 0
    ends: dict[int, str] = field(default_factory=dict[int, str])
    """`trained`, `filtered(reason)` or `failed(reason)` by ordinal."""
    pending: frozenset[int] = frozenset()
    owes_evaluation: bool = False
    """Whether the last step's evaluation is missing because the run was stopped, or the start model's."""

    def ledger(self) -> Ledger:
        """The ledger to resume with: ends are kept, and pending prompts are yet to be admitted."""
        return Ledger(states=dict(self.ends), counts=Counter(self.ends.values()))

    def remaining(self, prompts: Iterator[Prompt]) -> Iterator[Prompt]:
        """The stream without the prompts that have reached an end: the pending ones first, in their order."""
        return (prompt for prompt in prompts if prompt.ordinal not in self.ends)

    def to_json(self) -> dict[str, Any]:
        """As plain values. Ordinals are runs of [first, last], because there may be millions."""
        by_state: dict[str, list[int]] = {"pending": sorted(self.pending)}
        for ordinal, state in sorted(self.ends.items()):
            by_state.setdefault(state, []).append(ordinal)
        return {
            "version": self.version,
            "trained_tokens": self.trained_tokens,
            "owes_evaluation": self.owes_evaluation,
            "ledger": {state: runs(ordinals) for state, ordinals in by_state.items()},
        }

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "Progress":
        """From plain values. Raises ValueError when an ordinal is in no state, or in two."""
        states: dict[int, str] = {}
        for state, saved in plain["ledger"].items():
            for ordinal in numbers(saved):
                if ordinal in states:
                    raise ValueError(f"prompt {ordinal} is both {states[ordinal]} and {state}")
                states[ordinal] = state
        missing = set(range(len(states))) - set(states)
        if missing:
            raise ValueError(f"prompt {min(missing)} is in no state, although later ones are")
        return cls(
            version=plain["version"],
            trained_tokens=plain["trained_tokens"],
            owes_evaluation=plain["owes_evaluation"],
            ends={o: s for o, s in states.items() if s != "pending"},
            pending=frozenset(o for o, s in states.items() if s == "pending"),
        )


def progress_of(version: int, ledger: Ledger, trained_tokens: int, owes_evaluation: bool) -> Progress:
    """The progress of a loop. Call it between steps: groups in training are neither pending nor finished."""
    assert not ledger.count("training"), "a step is under way"
    return Progress(
        version=version,
        trained_tokens=trained_tokens,
        ends={o: s for o, s in ledger.states.items() if s not in NEXT},
        pending=frozenset(o for o, s in ledger.states.items() if s in NEXT),
        owes_evaluation=owes_evaluation,
    )


def runs(ordinals: Iterable[int]) -> list[list[int]]:
    """Numbers in their order as runs of [first, last]."""
    found: list[list[int]] = []
    for ordinal in ordinals:
        if found and found[-1][1] == ordinal - 1:
            found[-1][1] = ordinal
        else:
            found.append([ordinal, ordinal])
    return found


def numbers(saved: Iterable[list[int]]) -> Iterator[int]:
    """The numbers of runs of [first, last], in their order."""
    return (number for first, last in saved for number in range(first, last + 1))
