"""Which causes does the evidence show? Each finding has its evidence and the change that fixes it."""

from rl.parity.evidence import Evidence
from trainer.doctor.facts import facts
from trainer.doctor.finding import Finding
from trainer.doctor.numbers import numbers, structure
from trainer.doctor.weights import weights


def diagnose(evidence: Evidence) -> list[Finding]:
    """All causes that the evidence shows, the most certain first: settings, weights, then numbers alone."""
    found = [*facts(evidence)]
    for one in evidence.weights:
        found += weights(one, evidence)
    for sample in evidence.samples:
        found += structure(sample)
        named = {f.cause for f in found if f.severity == "fault"}
        found += [f for f in numbers(sample, evidence.dtype, explained=bool(named)) if f.cause not in named]
    return found
