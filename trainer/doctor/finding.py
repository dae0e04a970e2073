"""One cause that the doctor found, with its evidence and what to do about it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trainer.doctor.remedies import REMEDIES


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One cause with its evidence. A fault ends a run before its first step; a warning is only shown."""

    cause: str
    severity: Literal["fault", "warning"]
    where: str
    evidence: str

    @property
    def remedy(self) -> str:
        """What to do."""
        return REMEDIES[self.cause]

    def __str__(self) -> str:
        return f"{self.cause} ({self.where}): {self.evidence}. {self.remedy}"


def faults_of(where: str) -> Callable[[str, str], Finding]:
    """Makes the faults of one place, from cause and evidence."""
    return lambda cause, evidence: Finding(cause=cause, severity="fault", where=where, evidence=evidence)


class ParityError(RuntimeError):
    """Engines and trainer compute different log-probabilities; the message names the causes and remedies."""
