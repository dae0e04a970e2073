"""How is a run examined? The short form before every run, and the full form of `unison doctor`."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TypeVar

from rl.config import Config
from rl.parity.gap import Gap, NoiseClip
from rl.types import Prompt
from trainer.cluster.cluster import Cluster
from trainer.cluster.remote import RemoteLearner, RemoteRollouts
from trainer.data.first_prompt import FirstPrompt
from trainer.doctor.check import ParityCheck
from trainer.doctor.comparisons import Comparison, Comparisons
from trainer.doctor.episodes.run import examine_episodes
from trainer.doctor.examine import PROMPTS, Examiner
from trainer.doctor.finding import Finding
from trainer.doctor.remedies import EPISODES
from trainer.plan.plan import make_plan
from trainer.prompts import Prepared
from trainer.runs.settings import stack_versions
from trainer.tracking.terminal import status

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """All findings about a run's engines, and what they mean for the run."""

    config: Config
    check: ParityCheck
    comparisons: list[Comparison]
    findings: list[Finding]
    seconds: float
    stack: dict[str, str] = field(default_factory=stack_versions)
    first_prompt: FirstPrompt | None = None

    @property
    def faults(self) -> list[Finding]:
        """What must be fixed before a run may start."""
        return [f for f in self.findings if f.severity == "fault"]

    @property
    def verdict(self) -> str:
        """ "fault" or "well"."""
        return "fault" if self.faults else "well"

    @property
    def old_logprobs(self) -> tuple[str, str]:
        """The value of `Config.old_logprobs` for this run, and why."""
        return self.check.old_logprobs()

    def message(self) -> str:
        """The text of the ParityError that ends the run."""
        what = "the engines' log-probabilities are not what the loss expects"
        if all(finding.cause in EPISODES for finding in self.faults):
            what = "the chat template or the environment does not do what many turns need"
        return f"{what}, so nothing was trained:\n" + "\n".join(f"- {finding}" for finding in self.faults)

    def coverage(self) -> list[tuple[str, str, str]]:
        """Each check, what it covers, and what it showed. Statistics in bf16 never certify an update."""
        e = self.check.evidence
        tensors = sum(len(w.sent) for w in e.weights)
        layers = [layer.error for w in e.weights for layer in w.layers]
        between = [max(part.error, part.decode_error) for w in e.weights for part in w.between]
        g = max((s.gap for s in e.samples), key=lambda g: (math.isnan(g.mean_abs), g.mean_abs))
        stale, surprise = sum(w.cached_after_update for w in e.weights), max((s.surprise for s in e.samples), key=abs)
        seen, parts = (
            f"largest error {max(errors):.1e} in {len(errors)} {noun}" if errors else "; ".join(e.notes)
            for errors, noun in ((layers, "layers"), (between, "places"))
        )
        ended = sum(s.ended for s in e.samples)
        samplers = [s.sampler for s in e.samples if s.sampler]
        worst = max((one.error for one in samplers), default=math.nan)
        sampler = f"mean |d| {worst:.1e}, {sum(one.tokens for one in samplers)} tokens" if samplers else "not visible"
        witness = max((s.witness.trainer.mean_abs for s in e.samples if s.witness), default=None)
        third = "not asked, because both sides agree" if witness is None else f"trainer: mean |d| {witness:.1e}"
        return [
            ("facts", "sampler settings, dtypes, tokenizer, template", "compared exactly"),
            ("digests", "every tensor arrived, bit for bit", f"{tensors} tensors of {len(e.weights)} engine(s)"),
            ("layers", "every tensor was loaded, and computes what the trainer's does", seen),
            ("between layers", "rotary embedding, attention, KV cache, residual stream; prefill and decode", parts),
            ("prefix cache", "no KV of older weights is used", f"{stale} stale tokens"),
            ("ends of replies", "the token that ends a reply is trained on", f"{ended} replies ended before the limit"),
            ("sampler", "the numbers are those that the engine's own logits give, in every dtype", sampler),
            ("witness", "the trainer computes what a fresh copy of the model computes, in fp32", third),
            ("draws", "tokens come from the reported distribution", f"{surprise:+.1f} sigmas"),
            (
                "log-probabilities",
                f"both sides compute the same; a k3 above {g.k3 + g.detectable_k3:.0e} would have shown"
                + ("" if e.dtype == "float32" else ". In bf16 this cannot show a single wrong tensor"),
                f"mean |d| {g.mean_abs:.1e}, k3 {g.k3:.1e} ± {g.k3_se:.0e}, {g.tokens} tokens",
            ),
        ]


async def examine_engines(
    cluster: Cluster, learner: RemoteLearner, prepared: Prepared, version: int = 0, into: RemoteRollouts | None = None
) -> DoctorReport:
    """Examine the engines of a run that is about to start, or to resume at `version`.

    Afterwards the engines hold the learner's weights as `version`, unless a fault was found. Where a run's first groups
    are what was examined, they wait for it in `into`, its rollouts.
    """
    episodes = await examine_episodes(cluster, prepared)
    began, config = time.perf_counter(), cluster.config
    first = first_prompts(config, prepared) if into and not version else []
    examiner = Examiner(cluster, learner, prepared, config.seed, first)
    comparisons: list[Comparison] = []
    findings: list[Finding] = []
    # Under versions of its own: the run's samples must not hit the prefixes that the check leaves in the cache. A run
    # without an interruption would not hit them either.
    before = 2 if config.doctor == "full" else min(version, 1)
    check = await examiner.examine(version - before)
    if config.doctor == "full" and not check.faults:
        conditions = Comparisons(examiner)
        comparisons = [configured_comparison(check), *await conditions.run_all(version - before)]
        findings = conditions.findings
    if before and not check.faults and not findings:
        await learner.publish(version)
    if into and examiner.begins:
        into.early = examiner.groups
    return DoctorReport(
        config=config,
        check=check,
        comparisons=comparisons,
        findings=[*episodes, *check.findings, *findings],
        seconds=time.perf_counter() - began,
        first_prompt=prepared.first,
    )


def first_prompts(config: Config, prepared: Prepared) -> list[Prompt]:
    """Those with which a run begins, if its first groups are replies, are sampled next to an evaluation (else the rate
    of the first step would be that of no sampling), and are not followed by a check that publishes other weights."""
    # They are read again, which only a list surely can be.
    if config.doctor != "short" or config.episodic or prepared.source is not None or not prepared.evals:
        return []
    return list(islice(prepared.stream(config.seed), min(PROMPTS, config.prompts_per_step)))


def configured_comparison(check: ParityCheck, name: str = "rollout | trainer, as configured") -> Comparison:
    """The gap with the run's own settings."""
    return noise_comparison(name, check.evidence.samples[0].gap, check.evidence.clip)


def noise_comparison(name: str, gap: Gap, clip: NoiseClip | None) -> Comparison:
    """A gap, with what its noise would clip."""
    return Comparison(name=name, gap=gap, note=f"noise would clip {clip.sequences:.0%} of sequences" if clip else "")


Reading = asyncio.Future[Prepared]
"""The data, read while the actors start."""


async def examine_short(config: Config, reading: Reading) -> DoctorReport:
    """The check that every run begins with, on engines that live only for it."""
    with status("starting the recipe's engines and learner"):
        return await on_own_engines(replace(config, doctor="short"), reading, examine_engines)


async def examine_full(config: Config, reading: Reading) -> DoctorReport:
    """All comparisons; those in other precisions and modes start engines of their own, one after the other."""
    began = time.perf_counter()
    with status("starting the recipe's engines and learner"):
        main = await on_own_engines(replace(config, doctor="full"), reading, examine_engines)
    comparisons, findings = list(main.comparisons), list(main.findings)
    for name, other in variations(config):
        if isinstance(other, str):
            comparisons.append(Comparison(name=name, gap=None, note=other))
            continue
        with status(f"starting other engines: {name}"):
            if other.dtype != "float32":
                # It shows its own noise, which is measured and not judged.
                comparisons.append(noise_comparison(name, *await on_own_engines(other, reading, compared)))
                continue
            report = await on_own_engines(other, reading, examine_engines)
        comparisons.append(configured_comparison(report.check, name))
        # A fault in fp32 is hidden, not absent, in the run's own precision.
        findings += [replace(f, where=f"{f.where}, {name}") for f in report.findings]
    return replace(main, comparisons=comparisons, findings=findings, seconds=time.perf_counter() - began)


def variations(config: Config) -> Iterator[tuple[str, Config | str]]:
    """The comparisons that need other engines: the config of each, or why it is left out."""
    short, r, cpu = replace(config, doctor="short"), config.rollout, make_plan(config).placement.device == "cpu"
    eager = cpu if r.enforce_eager is None else r.enforce_eager
    for dtype, fp32_head in (("float32", True), ("bfloat16", True), ("bfloat16", False)):
        if (dtype, fp32_head) == (config.dtype, config.fp32_head):
            continue
        name = f"rollout | trainer, {dtype} body, {'float32' if fp32_head else dtype} heads"
        # DeepSpeed has no fp32 gradients at ZeRO 0 in bf16, and no comparison depends on the stage.
        trainer = replace(config.trainer, zero_stage=max(config.trainer.zero_stage, int(dtype == "bfloat16")))
        yield name, _possible(replace(short, dtype=dtype, fp32_head=fp32_head, trainer=trainer))
    name = f"rollout | trainer, async scheduling {'off' if r.async_scheduling else 'on'}"
    other = replace(short, rollout=replace(r, async_scheduling=not r.async_scheduling))
    yield name, "vLLM supports it on GPUs only" if cpu else other
    name = f"rollout | trainer, {'compiled' if eager else 'eager'}"
    other = replace(short, rollout=replace(r, enforce_eager=not eager))
    yield name, "compiling for a CPU takes minutes" if cpu else other


def _possible(config: Config) -> Config | str:
    """The config, or why no run may have it: the report of the run's own settings must not be lost for that."""
    try:
        make_plan(config)
    except ValueError as error:
        return f"not possible: {error}"
    return config


Examine = Callable[[Cluster, RemoteLearner, Prepared], Awaitable[R]]


async def on_own_engines(config: Config, reading: Reading, examine: Examine[R]) -> R:
    """Start engines and a learner, examine them, and stop them."""
    config = replace(config, judges=())  # nothing is scored
    async with aclosing(Cluster(config, make_plan(config).placement)) as cluster:
        cluster.boot()
        prepared = await reading
        await cluster.start()
        learner = RemoteLearner(cluster, probe=prepared.train[0].token_ids)
        return await examine(cluster, learner, prepared)


async def compared(cluster: Cluster, learner: RemoteLearner, prepared: Prepared) -> tuple[Gap, NoiseClip | None]:
    """The gap alone."""
    return await Examiner(cluster, learner, prepared, cluster.config.seed).compare(0)
