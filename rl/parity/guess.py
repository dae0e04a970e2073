"""One guess about where a number comes from."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One guess, and the gap that it leaves unexplained."""

    cause: str
    """Key of `trainer.doctor.remedies`."""
    text: str
    """What would be going on."""
    residual: float
    """Mean |d| in nats that remains if the guess is right."""
    fitted: int = 0
    """Values that were fitted to the numbers."""
