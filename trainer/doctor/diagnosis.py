"""Which causes does the evidence show? Each finding has its evidence and the change that fixes it."""

from dataclasses import replace

from rl.parity.evidence import Evidence
from trainer.doctor.facts import facts
from trainer.doctor.finding import Finding
from trainer.doctor.numbers import drawn, engine_numbers, sampler_numbers, structure, trainer_at_fault, trainer_numbers
from trainer.doctor.weights import weights


def diagnose(evidence: Evidence) -> list[Finding]:
    """All causes that the evidence shows, the most certain first: settings, then weights and layers, then numbers.

    What other findings explain is left out: a wrong temperature also looks like tokens that are no draws.
    """
    dtype, temperature = evidence.dtype, evidence.driver_facts["temperature"]
    found = [*facts(evidence)]
    guilty = any(trainer_at_fault(s) for s in evidence.samples)
    innocent = guilty and not any(list(engine_numbers(s, dtype, temperature)) for s in evidence.samples)
    mine = [f for s in evidence.samples[:1] for f in trainer_numbers(s)] if guilty else []
    # Where an engine serves several requests for a reply, the later ones hit what the first left in the cache.
    choosing = {s.engine for s in evidence.samples if s.requests > 1}
    theirs = [
        f
        for one in evidence.weights
        for f in weights(one, evidence)
        if f.cause != "stale_prefix" or one.engine not in choosing
    ]
    if innocent:
        # Layers were compared with the trainer's, and the engine's numbers are the model's own.
        theirs = [replace(f, where=f"trainer, next to {f.where}") for f in theirs]
        specific = [f for f in mine if f.cause not in ("trainer_body", "unexplained")]
        found += [*specific, *theirs, *(f for f in mine if f not in specific)]
    else:
        found += [*theirs, *mine]
    for sample in evidence.samples:
        named = {f.cause for f in found if f.severity == "fault"}
        found += structure(sample)
        numbers = [f for f in sampler_numbers(sample, temperature) if f.cause not in named]
        if sample.requests > 1 and not list(engine_numbers(sample, dtype, temperature)):
            numbers = []  # the sampler was watched for the first request, and another one's reply was returned
        if not named and not any(f.cause != "unexplained" for f in numbers):
            # The bulk of the samples shows what a single reply cannot: numbers of other rows and prompts.
            numbers = _best([*numbers, *engine_numbers(sample, dtype, temperature)])
        found += numbers
        if not any(f.severity == "fault" for f in found):
            found += drawn(sample)
    return found


def _best(numbers: list[Finding]) -> list[Finding]:
    """Of findings about the same numbers, those with a name; else the first."""
    return [f for f in numbers if f.cause != "unexplained"] or numbers[:1]
