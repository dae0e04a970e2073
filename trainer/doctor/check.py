"""What did one check of engines and learner show, and what does it mean for the run's old log-probabilities?"""

from dataclasses import dataclass

import torch

from rl.config import Config
from rl.objectives.corrections import Uncorrected
from rl.parity.evidence import Evidence
from rl.types import Batch
from trainer.doctor.finding import Finding

CLIPPED = 0.01
"""Share of sequences clipped by noise above which `old_logprobs="auto"` recomputes."""


@dataclass(frozen=True, kw_only=True)
class ParityCheck:
    """Engines and learner of one config: evidence and findings."""

    config: Config
    evidence: Evidence
    findings: list[Finding]
    batches: list[Batch]
    """Samples of each engine."""
    trainer: list[torch.Tensor]
    """The trainer's log-probabilities of these samples: [B, T] in nats, by engine."""
    seconds: float

    @property
    def faults(self) -> list[Finding]:
        """What must be fixed before a run may start."""
        return [f for f in self.findings if f.severity == "fault"]

    def old_logprobs(self) -> tuple[str, str]:
        """The value of `old_logprobs="auto"` for this run, and why."""
        settled, clip = by_settings(self.config), self.evidence.clip
        name = type(self.config.objective).__name__
        if settled:
            return settled
        if clip is None:
            return "recompute", f"{name} has no clip range to compare with the noise"
        if clip.sequences > CLIPPED:
            return "recompute", f"noise alone would clip {clip.sequences:.0%} of {name}'s sequences"
        return "rollout", f"noise alone clips {clip.sequences:.1%} of {name}'s sequences"


def by_settings(config: Config) -> tuple[str, str] | None:
    """The value of `Config.old_logprobs`, and why, where the settings decide; None where the noise must decide."""
    name = type(config.objective).__name__
    if config.old_logprobs != "auto":
        return config.old_logprobs, "as configured"
    if config.objective.uses_old_logprobs:
        return "recompute", f"{name} compares the trainer's own with the engine's"
    if not isinstance(config.correction, Uncorrected):
        return "recompute", f"{type(config.correction).__name__} compares the trainer's own with the engine's"
    if config.max_staleness:
        return "recompute", f"max_staleness={config.max_staleness}: a sample's age must not use up the clip range"
    return None
