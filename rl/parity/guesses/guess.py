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
    """What remains if the guess is right: mean |d| in nats, or for a layer the share of its output."""
    fitted: int = 0
    """Values that were fitted to the numbers."""
