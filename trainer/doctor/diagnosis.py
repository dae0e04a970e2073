"""Which causes does the evidence show? Each finding has its evidence and the change that fixes it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from rl.parity.evidence import Evidence, LayerError, SampleEvidence, WeightEvidence
from rl.parity.gap import Gap
from trainer.doctor.remedies import REMEDIES

MEAN_GAP = {"float32": 3e-5, "bfloat16": 6e-2}
"""Largest mean |d| in nats at which the two sides count as equal. Clean runs show 5e-6 and 4e-2."""
LAYER_ERROR = {"float32": 1e-4, "bfloat16": 1.5e-2}
"""Largest relative error of a layer, on equal input, at which its weights count as equal. Clean runs show 1e-6 and
5e-3."""
EXPLAINED = 0.4
"""A hypothesis counts when it leaves less than this share of the gap unexplained."""
SURPRISE = 4.5
"""Standard deviations; a clean run exceeds it once in 150,000."""
GAP_SIGMAS = 5.0
"""k1 beyond this many standard errors is a bias: the two sides compute different things."""


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


class ParityError(RuntimeError):
    """Engines and trainer compute different log-probabilities; the message names the causes and remedies."""


def diagnose(evidence: Evidence) -> list[Finding]:
    """All causes that the evidence shows, the most certain first: settings, weights, then numbers alone."""
    found = [*_semantics(evidence)]
    for weights in evidence.weights:
        found += _weights(weights, evidence.dtype)
    for sample in evidence.samples:
        found += _structure(sample)
        named = {f.cause for f in found if f.severity == "fault"}
        found += [f for f in _numbers(sample, evidence.dtype, explained=bool(named)) if f.cause not in named]
    return found


# -- facts -------------------------------------------------------------------------------------------------------------


def _semantics(e: Evidence) -> Iterator[Finding]:
    mine, driver = e.learner_facts, e.driver_facts
    cut = mine["truncation"]
    for index, engine in enumerate(e.engine_facts):

        def fault(cause: str, evidence: str, where: str = f"engine {index}") -> Finding:
            return Finding(cause=cause, severity="fault", where=where, evidence=evidence)

        if engine["logprobs_mode"] != "processed_logprobs":
            yield fault("raw_logprobs", f"logprobs_mode is {engine['logprobs_mode']!r}")
        if engine["temperature"] != mine["temperature"]:
            yield fault(
                "temperature", f"the engine samples at {engine['temperature']:g}, the loss uses {mine['temperature']:g}"
            )
        wanted = (cut.top_p, cut.top_k, cut.min_p) if cut else (1.0, 0, 0.0)
        got = tuple(engine[name] for name in ("top_p", "top_k", "min_p"))
        if got != wanted:
            yield fault("truncation", f"the engine samples with top_p, top_k, min_p = {got}, the loss uses {wanted}")
        if any(engine["penalties"]):
            yield fault("penalties", f"presence, frequency, repetition penalties are {engine['penalties']}")
        if engine["dtype"] != mine["dtype"]:
            yield fault("dtype", f"the engine's body is in {engine['dtype']}, the trainer's in {mine['dtype']}")
        if engine["head_dtype"] != mine["head_dtype"]:
            yield fault(
                "head_dtype",
                f"the engine's lm_head is in {engine['head_dtype']}, the trainer's in {mine['head_dtype']}",
            )
        if engine["tied"] != mine["tied"]:
            yield fault("tied_head", f"tied embeddings: engine {engine['tied']}, trainer {mine['tied']}")
        if engine["generation_config"] != "vllm":
            yield fault("generation_config", f"generation_config is {engine['generation_config']!r}")
        if engine["chat_template"] != driver["chat_template"]:
            yield fault("template", "the engine's chat template is not the one that wrote the prompts")
        elif engine["prompt"] != driver["prompt"]:
            at = next(
                (i for i, (a, b) in enumerate(zip(engine["prompt"], driver["prompt"], strict=False)) if a != b), -1
            )
            yield fault("tokenizer", f"the engine's tokenizer gives other tokens for the first prompt, from token {at}")
        if engine["vocabulary"] != driver["vocabulary"]:
            yield fault(
                "tokenizer",
                f"the engine's tokenizer has {engine['vocabulary']} tokens, the driver's has {driver['vocabulary']}",
            )
        if engine["stop_ids"] != driver["stop_ids"]:
            yield fault(
                "stop_ids",
                f"the engine ends replies at the tokens {engine['stop_ids']}, the model's files list "
                f"{driver['stop_ids']}",
            )
        elif not driver["stop_ids"]:
            yield Finding(
                cause="no_stop_ids",
                severity="warning",
                where=f"engine {index}",
                evidence="no token ends a reply, so each runs to rollout.max_tokens",
            )


# -- weights -----------------------------------------------------------------------------------------------------------


def _weights(w: WeightEvidence, dtype: str) -> Iterator[Finding]:
    where = f"engine {w.engine}"

    def fault(cause: str, evidence: str) -> Finding:
        return Finding(cause=cause, severity="fault", where=where, evidence=evidence)

    moved = [name for name, digest in w.live.items() if w.sent.get(name) != digest]
    if len(moved) > len(w.live) / 2:
        yield fault(
            "stale_weights",
            f"{len(moved)} of {len(w.live)} tensors sent as version {w.version} are not the "
            f"trainer's current ones, first {moved[0]!r}",
        )
    elif moved:
        yield fault("tensor_differs", f"{moved[0]!r} was sent with other values than the trainer has")
    for received in w.received:
        lost = [name for name in w.sent if name not in received]
        changed = [name for name in w.sent if name in received and received[name] != w.sent[name]]
        if lost:
            yield fault("tensor_not_synced", f"{lost[0]!r} never arrived ({len(lost)} of {len(w.sent)} tensors)")
        if changed:
            yield fault("tensor_differs", f"{changed[0]!r} arrived with other bits than the trainer sent")
    if w.cached_after_update:
        yield fault(
            "stale_prefix",
            f"after the update to version {w.version}, {w.cached_after_update} prompt tokens came from the KV of older "
            f"weights",
        )
    if not moved:
        yield from _layers(w.layers, dtype, fault)


def _layers(layers: list[LayerError], dtype: str, fault: Callable[[str, str], Finding]) -> Iterator[Finding]:
    limit = LAYER_ERROR[dtype]
    bad = [layer for layer in layers if not layer.error <= limit]
    if not bad:
        return
    matrices = [layer for layer in bad if layer.kind != "norm"]
    first = bad[0]
    text = f"on equal input, the output of {first.name!r} differs by {first.error:.1e} of its size (limit {limit:g})"
    if [layer.kind for layer in bad] == ["head"] and first.bf16_error < 0.3 * first.error:
        yield fault(
            "head_dtype",
            f"every layer agrees but the lm_head, which differs by {first.error:.1e} (in bf16 {first.bf16_error:.1e})",
        )
    elif [layer.kind for layer in bad] == ["head"]:
        yield fault("tied_head", f"every layer agrees but the lm_head, which differs by {first.error:.1e}")
    elif len(matrices) > 0.5 * sum(layer.kind != "norm" for layer in layers):
        yield fault("stale_weights", f"{len(bad)} of {len(layers)} layers differ; {text}")
    elif not matrices and all(layer.bf16_error < 0.3 * layer.error for layer in bad):
        yield fault("norm_dtype", f"{text}; it agrees once its weight is rounded to bf16")
    elif abs(first.scale - 1) > 2e-3 and first.scaled_error < 0.2 * first.error:
        yield fault("tensor_differs", f"{text}; it equals the trainer's times {first.scale:.4g}")
    else:
        yield fault("tensor_not_synced", f"{text}; {len(bad)} of {len(layers)} layers hold other values")


# -- numbers -----------------------------------------------------------------------------------------------------------


def _structure(s: SampleEvidence) -> Iterator[Finding]:
    where = f"engine {s.engine}"
    if s.nonfinite:
        text = f"{s.nonfinite} of {s.gap.tokens} sampled tokens have no finite log-probability"
        yield Finding(cause="nonfinite", severity="fault", where=where, evidence=text)
    if s.wrong_version:
        text = f"{s.wrong_version} of {s.gap.tokens} tokens have another weight version than the engine"
        yield Finding(cause="versions", severity="fault", where=where, evidence=text)
    if s.ended_without_stop_token:
        text = f"{s.ended_without_stop_token} of {s.ended} finished replies lack the token that ended them"
        yield Finding(cause="eos", severity="fault", where=where, evidence=text)


def agrees(gap: Gap, dtype: str) -> bool:
    """Whether a gap is below half of its limit, and unbiased."""
    return gap.mean_abs <= MEAN_GAP[dtype] / 2 and not is_biased(gap, dtype)


def is_biased(gap: Gap, dtype: str) -> bool:
    """Whether a gap is biased: rounding raises as many log-probabilities as it lowers."""
    return abs(gap.k1) > max(0.3 * MEAN_GAP[dtype], GAP_SIGMAS * gap.k1_se)


def _numbers(s: SampleEvidence, dtype: str, *, explained: bool) -> Iterator[Finding]:
    where, g, limit = f"engine {s.engine}", s.gap, MEAN_GAP[dtype]
    size = f"mean |d| {g.mean_abs:.1e} nats, k1 {g.k1:+.1e} ± {g.k1_se:.0e}, k3 {g.k3:.1e}"
    best = s.hypotheses[0] if s.hypotheses else None
    if best is not None and best.residual < EXPLAINED * g.mean_abs and not agrees(g, dtype):
        text = f"{size}; best explanation: {best.text}; leaves {best.residual:.1e} nats unexplained"
        yield Finding(cause=best.cause, severity="fault", where=where, evidence=text)
    elif not g.mean_abs <= limit or is_biased(g, dtype):  # not >: a NaN is a fault
        if not explained:
            yield Finding(cause="unexplained", severity="fault", where=where, evidence=f"{size} (limit {limit:g})")
    elif not abs(s.surprise) <= SURPRISE:
        text = f"log-probabilities agree, but tokens are {s.surprise:+.1f} standard deviations less likely than draws"
        yield Finding(cause="not_drawn", severity="fault", where=where, evidence=text)
