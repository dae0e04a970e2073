"""Do engine, trainer and driver have the same settings?"""

from collections.abc import Iterator

from rl.parity.evidence import Evidence
from rl.typed import show
from trainer.doctor.finding import Finding


def facts(e: Evidence) -> Iterator[Finding]:
    """Settings that differ."""
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
        if engine["forbidden"] != mine["forbidden"]:
            differ = [name for name, ours in mine["forbidden"].items() if ours != engine["forbidden"][name]]
            here, there = ({name: show(side["forbidden"][name]) for name in differ} for side in (engine, mine))
            yield fault("forbidden", f"the engine forbids {here}, the loss {there}")
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
