"""A checkup from start to report: the short form before every run, and the full one of `unison doctor`."""

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from rl.config import Config
from rl.parity.gap import Gap
from trainer.cluster.cluster import Cluster
from trainer.cluster.remote import RemoteLearner
from trainer.doctor.comparisons import Ladder, Rung
from trainer.doctor.diagnosis import Finding
from trainer.doctor.examine import Examination, Patient
from trainer.plan.plan import make_plan
from trainer.prompts import Prepared
from trainer.runs.settings import stack_versions
from trainer.tracking.terminal import status


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """What was found, and what follows for the run."""

    config: Config
    examination: Examination
    rungs: list[Rung]
    findings: list[Finding]
    seconds: float
    stack: dict[str, str] = field(default_factory=stack_versions)

    @property
    def faults(self) -> list[Finding]:
        """What must be mended before a run may start."""
        return [f for f in self.findings if f.severity == "fault"]

    @property
    def verdict(self) -> str:
        """One word."""
        return "fault" if self.faults else "well"

    @property
    def old_logprobs(self) -> tuple[str, str]:
        """What `Config.old_logprobs` comes to, and why."""
        return self.examination.old_logprobs()

    def message(self) -> str:
        """For the ParityError that ends the run."""
        return "the engines' log-probabilities do not mean what the loss thinks, so nothing was trained:\n" + "\n".join(
            f"- {finding}" for finding in self.faults
        )

    def coverage(self) -> list[tuple[str, str, str]]:
        """What was checked, what that covers, and what it showed. Statistics in bf16 never certify an update."""
        e = self.examination.evidence
        tensors = sum(len(w.sent) for w in e.weights)
        layers = [layer.error for w in e.weights for layer in w.layers]
        g = max((s.gap for s in e.samples), key=lambda g: (math.isnan(g.mean_abs), g.mean_abs))
        stale, surprise = sum(w.cached_after_update for w in e.weights), max((s.surprise for s in e.samples), key=abs)
        seen = f"{max(layers):.1e} at worst in {len(layers)} layers" if layers else "; ".join(e.notes)
        ended = sum(s.ended for s in e.samples)
        return [
            ("facts", "sampler's settings, dtypes, tokenizer, template", "compared exactly"),
            ("digests", "every tensor arrived, bit for bit", f"{tensors} tensors of {len(e.weights)} engine(s)"),
            ("layers", "every tensor was loaded, and acts like the trainer's", seen),
            ("prefix cache", "nothing of older weights is used", f"{stale} stale tokens"),
            ("ends of replies", "the token that ends a reply is trained on", f"{ended} replies ended by themselves"),
            ("draws", "tokens come from the distribution that is reported", f"{surprise:+.1f} sigmas"),
            (
                "log-probabilities",
                f"both sides mean the same; a k3 above {g.k3 + g.detectable_k3:.0e} would have shown"
                + ("" if e.dtype == "float32" else ". In bf16 this sees no single wrong tensor"),
                f"mean |d| {g.mean_abs:.1e}, k3 {g.k3:.1e} ± {g.k3_se:.0e}, {g.tokens} tokens",
            ),
        ]


async def checkup(cluster: Cluster, learner: RemoteLearner, prepared: Prepared, version: int = 0) -> Checkup:
    """Examine the engines of a run that is about to start, or to go on at `version`; they hold the learner's weights
    as that version afterwards."""
    began, config = time.perf_counter(), cluster.config
    patient = Patient(cluster, learner, prepared, config.seed)
    if config.doctor != "full":
        if not version:
            return _result(config, await patient.examine(0), began)
        # Under a version of its own: the prefixes that it leaves in the cache are not to be hit by the run's samples,
        # which hit none when the run came here without an interruption.
        examination = await patient.examine(version - 1)
        if not examination.faults:
            await learner.publish(version)
        return _result(config, examination, began)
    examination = await patient.examine(version - 2)
    if any(f.severity == "fault" for f in examination.findings):
        return _result(config, examination, began)
    ladder = Ladder(patient)
    rungs = [first_rung(examination), *await ladder.climb(version - 2)]
    if not ladder.findings:
        await learner.publish(version)
    return _result(config, examination, began, rungs, ladder.findings)


def _result(
    config: Config, examination: Examination, began: float, rungs: Sequence[Rung] = (), more: Sequence[Finding] = ()
) -> Checkup:
    return Checkup(
        config=config,
        examination=examination,
        rungs=list(rungs),
        findings=[*examination.findings, *more],
        seconds=time.perf_counter() - began,
    )


def first_rung(examination: Examination, name: str = "rollout | trainer, as configured") -> Rung:
    """The run's own gap."""
    gap: Gap = examination.evidence.samples[0].gap
    clip = examination.evidence.clip
    return Rung(name=name, gap=gap, note=f"noise would clip {clip.sequences:.0%} of sequences" if clip else "")


Reading = asyncio.Task[Prepared]
"""The data, which is read while the actors start."""


async def short_checkup(config: Config, reading: Reading) -> Checkup:
    """The checkup that every run begins with, on engines that live only for it."""
    with status("starting the recipe's engines and learner"):
        return await _visit(replace(config, doctor="short"), reading)


async def full_checkup(config: Config, reading: Reading) -> Checkup:
    """The whole ladder, with engines of its own in other precisions and modes, one after the other."""
    began = time.perf_counter()
    with status("starting the recipe's engines and learner"):
        main = await _visit(replace(config, doctor="full"), reading)
    rungs, findings = list(main.rungs), list(main.findings)
    for name, other in variations(config):
        if isinstance(other, str):
            rungs.append(Rung(name=name, gap=None, note=other))
            continue
        with status(f"starting others: {name}"):
            visit = await _visit(other, reading)
        rungs.append(first_rung(visit.examination, name))
        # What fp32 shows, the run's own precision only hides; what the others show is their noise.
        findings += [replace(f, where=f"{f.where}, {name}") for f in visit.findings if other.dtype == "float32"]
    return replace(main, rungs=rungs, findings=findings, seconds=time.perf_counter() - began)


def variations(config: Config) -> Iterator[tuple[str, Config | str]]:
    """The rungs that need other engines: a config each, or why it is left out."""
    short, r, cpu = replace(config, doctor="short"), config.rollout, make_plan(config).placement.device == "cpu"
    for dtype, fp32_head in (("float32", True), ("bfloat16", True), ("bfloat16", False)):
        if (dtype, fp32_head) == (config.dtype, config.fp32_head):
            continue
        name = f"rollout | trainer, {dtype} body, {'float32' if fp32_head else dtype} heads"
        possible = dtype == "float32" or not (r.truncation and cpu)
        yield name, replace(short, dtype=dtype, fp32_head=fp32_head) if possible else "truncation on CPU needs float32"
    name = f"rollout | trainer, async scheduling {'off' if r.async_scheduling else 'on'}"
    other = replace(short, rollout=replace(r, async_scheduling=not r.async_scheduling))
    yield name, "vLLM has it on GPUs only" if cpu else other
    name = f"rollout | trainer, {'compiled' if r.enforce_eager else 'eager'}"
    other = replace(short, rollout=replace(r, enforce_eager=not r.enforce_eager))
    yield name, "compiling for a CPU takes minutes" if cpu else other


async def _visit(config: Config, reading: Reading) -> Checkup:
    """A checkup of engines that live only for it."""
    cluster = Cluster(config, make_plan(config).placement)
    try:
        cluster.boot()
        prepared = await reading
        await cluster.start()
        learner = RemoteLearner(cluster, probe=prepared.train[0].token_ids)
        return await checkup(cluster, learner, prepared)
    finally:
        await asyncio.shield(cluster.close())
