"""Do engine and trainer have the settings of the run? Each side is compared with the driver, not with the other."""

from collections.abc import Iterator
from typing import Any

from rl.parity.architecture import differing
from rl.parity.evidence import Evidence, SamplerEvidence
from rl.typed import show
from trainer.doctor.finding import Finding, faults_of

PRECISION = 1e-5
"""Relative; settings pass through fp32."""
OFF = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}


def facts(e: Evidence) -> Iterator[Finding]:
    """Settings that differ from the run's."""
    yield from _trainer(e)
    for index, engine in enumerate(e.engine_facts):
        sampler = next((s.sampler for s in e.samples if s.engine == index), None)
        found = [*_engine(engine, e.driver_facts, index)]
        yield from found
        known = {f.cause for f in found}
        yield from (f for f in _sampler(sampler, e.driver_facts, index) if f.cause not in known)


def _cut(facts: dict[str, Any]) -> tuple[float, int, float]:
    cut = facts["truncation"]
    return (cut.top_p, cut.top_k, cut.min_p) if cut else (1.0, 0, 0.0)


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= PRECISION * max(abs(a), abs(b))


def _shared(side: dict[str, Any], driver: dict[str, Any], who: str, where: str) -> Iterator[Finding]:
    """What engine and trainer both have."""
    fault = faults_of(where)
    if not _same(side["temperature"], driver["temperature"]):
        text = f"{who} has the temperature {side['temperature']:g}, and the run {driver['temperature']:g}"
        yield fault("temperature", text)
    if side["forbidden"] != driver["forbidden"]:
        differ = [name for name, wanted in driver["forbidden"].items() if wanted != side["forbidden"][name]]
        here, there = ({name: show(one["forbidden"][name]) for name in differ} for one in (side, driver))
        yield fault("forbidden", f"{who} forbids {here}, and the run {there}")
    if side["dtype"] != driver["dtype"]:
        yield fault("dtype", f"{who} has a body in {side['dtype']}, and the run one in {driver['dtype']}")
    if side["head_dtype"] != driver["head_dtype"]:
        text = f"{who} has an lm_head in {side['head_dtype']}, and the run one in {driver['head_dtype']}"
        yield fault("head_dtype", text)
    if side["tied"] != driver["tied"]:
        text = f"tied embeddings: {who} {side['tied']}, the model's files {driver['tied']}"
        yield fault("tied_head", text)
    if other := differing(side["architecture"], driver["architecture"]):
        text = ", ".join(f"{name} is {show(a)} instead of {show(b)}" for name, (a, b) in list(other.items())[:3])
        yield fault("config", f"{who} has another architecture than the model's files: {text}")


def _trainer(e: Evidence) -> Iterator[Finding]:
    mine, driver = e.learner_facts, e.driver_facts
    yield from _shared(mine, driver, "the trainer", "trainer")
    if _cut(mine) != _cut(driver):
        text = f"the trainer's top_p, top_k, min_p are {_cut(mine)}, and the run's {_cut(driver)}"
        yield Finding(cause="truncation", severity="fault", where="trainer", evidence=text)


def _engine(engine: dict[str, Any], driver: dict[str, Any], index: int) -> Iterator[Finding]:
    fault = faults_of(f"engine {index}")
    if engine["logprobs_mode"] != "processed_logprobs":
        yield fault("raw_logprobs", f"logprobs_mode is {engine['logprobs_mode']!r}")
    yield from _shared(engine, driver, "the engine", f"engine {index}")
    got = tuple(engine[name] for name in ("top_p", "top_k", "min_p"))
    if got != _cut(driver):
        yield fault("truncation", f"the engine samples with top_p, top_k, min_p = {got}, and the run {_cut(driver)}")
    if any(engine["penalties"]):
        yield fault("penalties", f"presence, frequency, repetition penalties are {engine['penalties']}")
    if engine["logit_bias"]:
        yield fault("logit_bias", f"logit_bias is {show(engine['logit_bias'])}")
    if engine["allowed_token_ids"] is not None:
        yield fault("allowed_tokens", f"allowed_token_ids is {show(engine['allowed_token_ids'])}")
    if engine["ignore_eos"]:
        yield fault("ignored_eos", "ignore_eos is set")
    if engine["quantization"]:
        yield fault("quantization", f"the engine quantises its weights ({engine['quantization']})")
    if engine["kv_cache_dtype"] not in ("auto", driver["dtype"]):
        yield fault("kv_cache", f"the KV cache is in {engine['kv_cache_dtype']}, and the run in {driver['dtype']}")
    if engine["generation_config"] != "vllm":
        yield fault("generation_config", f"generation_config is {engine['generation_config']!r}")
    yield from _texts(engine, driver, index)


def _texts(engine: dict[str, Any], driver: dict[str, Any], index: int) -> Iterator[Finding]:
    """Tokenizer, template and the ends of replies."""
    fault = faults_of(f"engine {index}")
    if engine["chat_template"] != driver["chat_template"]:
        yield fault("template", "the engine's chat template is not the one that wrote the prompts")
    elif engine["prompt"] != driver["prompt"]:
        pairs = enumerate(zip(engine["prompt"], driver["prompt"], strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(engine["prompt"]), len(driver["prompt"])))
        yield fault("tokenizer", f"the engine's tokenizer gives other tokens for the first prompt, from token {at}")
    if engine["vocabulary"] != driver["vocabulary"]:
        text = f"the engine's tokenizer has {engine['vocabulary']} tokens, the driver's has {driver['vocabulary']}"
        yield fault("tokenizer", text)
    if engine["stop_ids"] != driver["stop_ids"]:
        yield fault(
            "stop_ids",
            f"the engine ends replies at the tokens {engine['stop_ids']}, the model's files list {driver['stop_ids']}",
        )
    elif not driver["stop_ids"]:
        text = "no token ends a reply, so each runs to rollout.max_tokens"
        yield Finding(cause="no_stop_ids", severity="warning", where=f"engine {index}", evidence=text)


def _sampler(s: SamplerEvidence | None, driver: dict[str, Any], index: int) -> Iterator[Finding]:
    """The settings that the sampler read for a reply, whatever the engine's own settings are."""
    if s is None or not s.settings:
        return
    got = s.settings

    def fault(cause: str, evidence: str) -> Finding:
        text = f"for a reply of this run, the sampler had {evidence}"
        return Finding(cause=cause, severity="fault", where=f"engine {index}", evidence=text)

    if got["greedy"]:
        yield fault("greedy", "no temperature: it takes the most likely token")
    elif not _same(got["temperature"], driver["temperature"]):
        yield fault("temperature", f"the temperature {got['temperature']:g}, and the run has {driver['temperature']:g}")
    wanted = dict(zip(("top_p", "top_k", "min_p"), _cut(driver), strict=True))
    if any(not _same(got[name], value) for name, value in wanted.items()):
        yield fault("truncation", f"{show({name: got[name] for name in wanted})}, and the run has {show(wanted)}")
    if penalties := {name: got[name] for name, off in OFF.items() if not _same(got[name], off)}:
        yield fault("penalties", f"{show(penalties)}")
    if got["logit_bias"]:
        yield fault("logit_bias", f"a bias on tokens: {show(got['logit_bias'])}")
    if got["tokens_not_allowed"]:
        yield fault("allowed_tokens", f"{got['tokens_not_allowed']} tokens that it may not sample")
    forbidden = driver["forbidden"]
    if got["bad_words"] != sorted(forbidden["words"]) or got["min_tokens"] != forbidden["min_tokens"]:
        text = f"min_tokens={got['min_tokens']}, bad words {show(got['bad_words'])}, and the run {forbidden}"
        yield fault("forbidden", text)
    if got["other_processors"]:
        yield fault("not_drawn", f"logits processors that the run does not know: {got['other_processors']}")
