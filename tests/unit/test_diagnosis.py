"""Facts, digests and layers that differ lead to the cause that they show; what agrees leads to none."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from rl.parity.body.repeat import first_change
from rl.parity.draws import Draws
from rl.parity.evidence import (
    Evidence,
    LayerError,
    SampleEvidence,
    SamplerEvidence,
    WeightEvidence,
    WitnessEvidence,
)
from rl.parity.gap import Gap, NoiseClip, gap
from rl.parity.guesses.guess import Hypothesis
from rl.sampling.truncation import Truncation
from trainer.doctor.diagnosis import diagnose
from trainer.doctor.remedies import REMEDIES

ENGINE = {
    "logprobs_mode": "processed_logprobs",
    "dtype": "float32",
    "head_dtype": "float32",
    "tied": True,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "forbidden": {"min_tokens": 0, "stop_ids": [], "words": []},
    "penalties": [0.0, 0.0, 0.0],
    "logit_bias": {},
    "allowed_token_ids": None,
    "ignore_eos": False,
    "architecture": {"rope_theta": 1e4},
    "kv_cache_dtype": "auto",
    "quantization": None,
    "generation_config": "vllm",
    "stop_ids": [1],
    "vocabulary": 100,
    "chat_template": "t",
    "prompt": [5, 6],
}
LEARNER = {
    "dtype": "float32",
    "head_dtype": "float32",
    "tied": True,
    "temperature": 1.0,
    "truncation": None,
    "forbidden": {"min_tokens": 0, "stop_ids": [], "words": []},
    "architecture": {"rope_theta": 1e4},
}
DRIVER = LEARNER | {"chat_template": "t", "prompt": [5, 6], "stop_ids": [1], "vocabulary": 100}
DIGESTS = {f"w{i}": f"d{i}" for i in range(6)}
LAYER = LayerError(name="w0", kind="linear", error=1e-6, scale=1.0)


def gap_of(d: float, noise: float = 1e-6) -> Gap:
    generator = torch.Generator().manual_seed(0)
    x = d + noise * torch.randn(8, 10, generator=generator, dtype=torch.float64)
    return gap(x, torch.zeros_like(x), torch.ones(8, 10, dtype=torch.bool))


def weights(**changes: Any) -> WeightEvidence:
    layers = [replace(LAYER, name=f"w{i}") for i in range(6)]
    clean = WeightEvidence(engine=0, version=3, sent=DIGESTS, live=DIGESTS, received=[DIGESTS], layers=layers)
    return replace(clean, **changes)


def sample(**changes: Any) -> SampleEvidence:
    clean = SampleEvidence(
        engine=0,
        gap=gap_of(0.0),
        surprise=0.3,
        nonfinite=0,
        ended=4,
        ended_without_stop_token=0,
        wrong_version=0,
    )
    return replace(clean, **changes)


def evidence(**changes: Any) -> Evidence:
    clean = Evidence(
        dtype="float32",
        engine_facts=[ENGINE],
        learner_facts=LEARNER,
        driver_facts=DRIVER,
        weights=[weights()],
        samples=[sample()],
        clip=NoiseClip(tokens=0.0, sequences=0.0),
    )
    return replace(clean, **changes)


def test_agreement_leads_to_no_finding() -> None:
    assert diagnose(evidence()) == []
    assert diagnose(evidence(dtype="bfloat16", samples=[sample(gap=gap_of(0.0, noise=0.04))])) == []


@pytest.mark.parametrize(
    ("fact", "value", "cause"),
    [
        ("logprobs_mode", "raw_logprobs", "raw_logprobs"),
        ("temperature", 0.9, "temperature"),
        ("top_p", 0.9, "truncation"),
        ("top_k", 20, "truncation"),
        ("penalties", [0.0, 0.0, 0.1], "penalties"),
        ("forbidden", {"min_tokens": 5, "stop_ids": [1], "words": []}, "forbidden"),
        ("logit_bias", {7: 2.0}, "logit_bias"),
        ("allowed_token_ids", [1, 2], "allowed_tokens"),
        ("ignore_eos", True, "ignored_eos"),
        ("architecture", {"rope_theta": 1e6}, "config"),
        ("kv_cache_dtype", "fp8", "kv_cache"),
        ("quantization", "fp8", "quantization"),
        ("dtype", "bfloat16", "dtype"),
        ("head_dtype", "bfloat16", "head_dtype"),
        ("tied", False, "tied_head"),
        ("generation_config", "auto", "generation_config"),
        ("chat_template", "u", "template"),
        ("prompt", [5, 7], "tokenizer"),
        ("stop_ids", [1, 7], "stop_ids"),
        ("vocabulary", 99, "tokenizer"),
    ],
)
def test_a_fact_that_differs_is_named_with_a_remedy(fact: str, value: Any, cause: str) -> None:
    found = [f for f in diagnose(evidence(engine_facts=[ENGINE, ENGINE | {fact: value}])) if f.severity == "fault"]
    assert [(f.cause, f.where) for f in found] == [(cause, "engine 1")]
    assert found[0].remedy == REMEDIES[cause]


def test_a_cut_that_both_sides_make_is_no_fault_and_one_that_differs_is() -> None:
    both = ENGINE | {"top_p": 0.9, "top_k": 20}
    mine = LEARNER | {"truncation": Truncation(top_p=0.9, top_k=20)}
    run = DRIVER | {"truncation": Truncation(top_p=0.9, top_k=20)}
    assert diagnose(evidence(engine_facts=[both], learner_facts=mine, driver_facts=run)) == []
    found = diagnose(evidence(engine_facts=[both | {"top_p": 0.95}], learner_facts=mine, driver_facts=run))
    assert [(f.cause, f.where) for f in found] == [("truncation", "engine 0")]
    found = diagnose(evidence(engine_facts=[both], driver_facts=run))
    assert [(f.cause, f.where) for f in found] == [("truncation", "trainer")]


def test_the_side_that_differs_from_the_run_is_the_one_at_fault() -> None:
    found = diagnose(evidence(learner_facts=LEARNER | {"temperature": 0.9}))
    assert [(f.cause, f.where) for f in found] == [("temperature", "trainer")]


SETTINGS = {
    "greedy": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "tokens_not_allowed": 0,
    "bad_words": [],
    "logit_bias": {},
    "min_tokens": 0,
    "other_processors": [],
}


def sampler(**changes: Any) -> SamplerEvidence:
    clean = SamplerEvidence(
        engine=0, tokens=32, error=1e-7, handed_on=0.0, other_tokens=0, settings=SETTINGS, guesses=[]
    )
    return replace(clean, **changes)


@pytest.mark.parametrize(
    ("setting", "value", "cause"),
    [
        ("greedy", True, "greedy"),
        ("temperature", 0.9, "temperature"),
        ("min_p", 0.1, "truncation"),
        ("repetition_penalty", 1.1, "penalties"),
        ("tokens_not_allowed", 5, "allowed_tokens"),
        ("logit_bias", {3: 1.0}, "logit_bias"),
        ("bad_words", [[4, 5]], "forbidden"),
        ("min_tokens", 3, "forbidden"),
        ("other_processors", ["Mine"], "not_drawn"),
    ],
)
def test_a_setting_that_only_the_sampler_has_is_named(setting: str, value: Any, cause: str) -> None:
    assert diagnose(evidence(samples=[sample(sampler=sampler())])) == []
    found = diagnose(evidence(samples=[sample(sampler=sampler(settings=SETTINGS | {setting: value}))]))
    assert [f.cause for f in found] == [cause]


def test_numbers_that_the_engines_own_logits_do_not_give_are_the_samplers_or_lie_on_the_way() -> None:
    guess = Hypothesis(cause="unit", text="the numbers are in bits (log2)", residual=1e-7)
    wrong = sampler(error=0.5, guesses=[guess])
    found = diagnose(evidence(dtype="bfloat16", samples=[sample(sampler=wrong)]))
    assert [f.cause for f in found] == ["unit"]
    assert "in the sampler" in found[0].evidence
    found = diagnose(evidence(samples=[sample(sampler=replace(wrong, handed_on=0.5))]))
    assert "between the sampler and the trainer" in found[0].evidence
    assert [f.cause for f in diagnose(evidence(samples=[sample(sampler=sampler(other_tokens=2))]))] == ["swapped"]


def test_stop_ids_that_differ_are_a_fault_and_none_on_both_sides_are_a_warning() -> None:
    found = diagnose(evidence(engine_facts=[ENGINE], driver_facts=DRIVER | {"stop_ids": [1, 7]}))
    assert [(f.cause, f.severity) for f in found] == [("stop_ids", "fault")]
    assert "[1, 7]" in found[0].evidence
    none = {"stop_ids": []}
    found = diagnose(evidence(engine_facts=[ENGINE | none], driver_facts=DRIVER | none))
    assert [(f.cause, f.severity) for f in found] == [("no_stop_ids", "warning")]


def fit(cause: str, residual: float) -> Hypothesis:
    return Hypothesis(cause=cause, text=f"{cause} fits", residual=residual)


def only(index: int, **changes: Any) -> list[LayerError]:
    layers = weights().layers
    return [replace(layer, **changes) if i == index else layer for i, layer in enumerate(layers)]


@pytest.mark.parametrize(
    ("changes", "cause", "shows"),
    [
        ({"live": dict.fromkeys(DIGESTS, "new")}, "stale_weights", "6 of 6 tensors"),
        ({"live": DIGESTS | {"w2": "new"}}, "tensor_differs", "'w2' was sent"),
        ({"received": [{k: v for k, v in DIGESTS.items() if k != "w4"}]}, "tensor_not_synced", "'w4' never arrived"),
        ({"received": [DIGESTS, DIGESTS | {"w1": "x"}]}, "tensor_differs", "'w1' arrived"),
        ({"cached_after_update": 64}, "stale_prefix", "64 prompt tokens"),
        ({"layers": only(3, error=0.02, fits=[fit("scale", 1e-6)])}, "scale", "scale fits, which leaves 1.0e-06"),
        (
            {"layers": only(3, error=0.7, fits=[fit("scale", 0.6)])},
            "tensor_loaded",
            "scale fits, which leaves 86%",
        ),
        ({"layers": only(3, error=0.7), "received": []}, "tensor_not_synced", "'w3'"),
        ({"layers": only(3, error=float("nan"))}, "tensor_loaded", "'w3'"),
        ({"layers": only(5, kind="norm", error=2e-3, fits=[fit("norm_dtype", 1e-6)])}, "norm_dtype", "norm_dtype fits"),
        ({"layers": only(5, kind="head", error=0.3, fits=[fit("head_dtype", 0.2)])}, "tied_head", "but the lm_head"),
        ({"layers": only(5, kind="head", error=3e-3, fits=[fit("head_dtype", 1e-5)])}, "head_dtype", "but the lm_head"),
        ({"layers": [replace(LAYER, error=1e-3)] * 6}, "stale_weights", "6 of 6 layers"),
    ],
)
def test_weights_that_differ_lead_to_the_cause_they_show(changes: dict, cause: str, shows: str) -> None:
    found = diagnose(evidence(weights=[weights(**changes)]))
    assert [f.cause for f in found] == [cause]
    assert shows in found[0].evidence


def witness(**changes: Any) -> WitnessEvidence:
    return replace(WitnessEvidence(trainer=gap_of(0.0), engine=gap_of(0.1), limit=3e-5), **changes)


def test_a_gap_has_the_name_of_a_guess_that_fits_and_else_the_closest_guess_without_a_name() -> None:
    guess = Hypothesis(cause="positions", text="positions are one too high", residual=1e-6)
    found = diagnose(evidence(samples=[sample(gap=gap_of(0.1), witness=witness(engine_guesses=[guess]))]))
    assert [(f.cause, f.where) for f in found] == [("positions", "engine 0")]
    assert "positions are one too high (leaves 1.0e-06 nats)" in found[0].evidence
    poor = replace(guess, residual=0.02)
    found = diagnose(evidence(samples=[sample(gap=gap_of(0.1), witness=witness(engine_guesses=[poor]))]))
    assert [f.cause for f in found] == ["unexplained"]
    assert "closest: positions are one too high" in found[0].evidence


def test_two_guesses_that_fit_alike_are_both_stated() -> None:
    guesses = [
        Hypothesis(cause="raw_logprobs", text="raw numbers", residual=1e-6),
        Hypothesis(cause="unit", text="other units", residual=1.2e-6),
        Hypothesis(cause="temperature", text="a fitted temperature", residual=1e-6, fitted=1),
    ]
    found = diagnose(evidence(samples=[sample(gap=gap_of(0.1), witness=witness(engine_guesses=guesses))]))
    assert [f.cause for f in found] == ["raw_logprobs"]
    assert "raw numbers or other units" in found[0].evidence
    assert "fitted temperature" not in found[0].evidence


def test_where_engine_and_witness_agree_the_trainer_is_at_fault_and_its_layers_too() -> None:
    seen = witness(
        trainer=gap_of(0.1), engine=gap_of(0.0), trainer_cause="trainer_body", trainer_text="hidden states differ"
    )
    bad = weights(layers=only(3, error=0.02, scale=1.02))
    found = diagnose(evidence(weights=[bad], samples=[sample(gap=gap_of(0.1), witness=seen)]))
    assert [f.where for f in found] == ["trainer, next to engine 0", "trainer"]
    named = replace(seen, trainer_cause="mode")
    found = diagnose(evidence(weights=[bad], samples=[sample(gap=gap_of(0.1), witness=named)]))
    assert found[0].cause == "mode"


def draw(**changes: Any) -> Draws:
    clean = Draws(
        surprise=0.0,
        tokens=100,
        best=60,
        best_expected=61.0,
        best_sigmas=-0.2,
        stops=3,
        stops_expected=3.2,
        stops_sigmas=0.0,
        no_stop_nats=0.0,
        inner_stops=0,
        odd_token=5,
        odd_count=4,
        odd_expected=3.0,
        odd_sigmas=0.6,
        alike_nats=3.0,
        alike_groups=0.0,
        likelier="the temperature 0.8",
        likelier_nats=0.1,
    )
    return replace(clean, **changes)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"inner_stops": 2}, "ignored_eos"),
        ({"no_stop_nats": 30.0}, "ignored_eos"),
        ({"alike_nats": 40.0}, "seeds"),
        ({"best": 100, "best_sigmas": 8.0}, "greedy"),
        ({"odd_sigmas": 9.0}, "not_drawn"),
        ({"stops_sigmas": -6.0}, "not_drawn"),
        ({"likelier_nats": 30.0}, "not_drawn"),
    ],
)
def test_tokens_that_are_no_draws_are_told_apart(changes: dict, cause: str) -> None:
    assert diagnose(evidence(samples=[sample(draws=draw())])) == []
    assert [f.cause for f in diagnose(evidence(samples=[sample(draws=draw(**changes))]))] == [cause]


def test_a_gap_that_is_no_number_is_a_fault() -> None:
    found = diagnose(evidence(samples=[sample(gap=replace(gap_of(0.0), mean_abs=float("nan")))]))
    assert [f.cause for f in found] == ["unexplained"]
    assert [f.cause for f in diagnose(evidence(samples=[sample(surprise=float("nan"))]))] == ["not_drawn"]


def test_a_gap_whose_cause_is_known_is_not_called_unexplained() -> None:
    bad = weights(layers=only(3, error=0.7))
    assert [f.cause for f in diagnose(evidence(weights=[bad], samples=[sample(gap=gap_of(0.1))]))] == ["tensor_loaded"]


def test_a_sign_below_the_limit_is_still_a_fault_and_noise_of_that_size_is_not() -> None:
    assert [f.cause for f in diagnose(evidence(samples=[sample(gap=gap_of(1.5e-5, noise=1e-7))]))] == ["unexplained"]
    assert diagnose(evidence(samples=[sample(gap=gap_of(0.0, noise=1.5e-5))])) == []


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"forbidden": 2}, "forbidden"),
        ({"nonfinite": 2}, "nonfinite"),
        ({"wrong_version": 1}, "versions"),
        ({"ended_without_stop_token": 3}, "eos"),
        ({"surprise": 5.0}, "not_drawn"),
        ({"surprise": -5.0}, "not_drawn"),
        ({"requests": 4.0}, "selected"),
        ({"too_long": 1}, "finish_reason"),
        ({"wrong_reason": 1}, "finish_reason"),
    ],
)
def test_what_samples_must_hold_is_held(changes: dict, cause: str) -> None:
    assert [f.cause for f in diagnose(evidence(samples=[sample(**changes)]))] == [cause]


@pytest.mark.parametrize(
    ("rows", "role", "cause"), [(1, "attention", "kv_cache"), (6, "attention", "kv_cache"), (1, "weights", "mode")]
)
def test_what_an_engine_computes_otherwise_the_second_time_is_its_cache_or_a_random_part(rows, role, cause):
    def trace(out):
        plain = ["float32", list(out.shape), out.numpy().tobytes()]
        same = ["float32", [6, 2], torch.ones(6, 2).numpy().tobytes()]
        return {"prompt": [0] * 6, "layers": {"attn": {"role": role, "in": [same], "out": plain}}}

    first = torch.arange(1.0, 13.0).reshape(6, 2)
    second = first.clone()
    second[6 - rows :] *= 1.5
    change = first_change(trace(first), trace(second), "float32")
    assert change is not None
    assert (change.name, change.rows, change.of) == ("attn", rows, 6)
    (found,) = diagnose(evidence(weights=[weights(changes=change)]))
    assert found.cause == cause
    assert f"at {rows} of 6 positions" in found.evidence
    assert first_change(trace(first), trace(first * (1 + 1e-6)), "float32") is None
