"""Faults that the doctor was not built on are named, and runs that are odd but right are not."""

from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import torch

from cases import nightly_unless
from clean_runs import CleanBench, CleanRun, clean_runs
from exam import Bench, rows, run_row
from planted import FAULTS
from planted_fault import Fault
from rl.batch import collate, trajectory
from rl.config import TrainerConfig
from rl.types import Completion, Prompt
from trainer.learner.rank import Rank

GATE = {"temperature applied twice", "log2", "BOS doubled", "a tensor sent scaled", "attention scale", "packs leak"}
"""One of each kind."""
CASES = [(fault.name, model, dtype) for fault, model, dtype in rows(FAULTS.values(), ("float32", "bfloat16"))]


def in_gate(name: str, model: str, dtype: str) -> bool:
    return name in GATE and model == "qwen2-untied" and dtype == "float32"


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    one = Bench()
    yield one
    one.close()


@pytest.mark.parametrize(("name", "model", "dtype"), nightly_unless(in_gate, CASES))
def test_a_planted_fault_is_seen_and_undone(bench: Bench, name: str, model: str, dtype: str) -> None:
    fault: Fault = FAULTS[name]
    row = run_row(bench, fault, model, dtype)
    print(f"\n{name}: {row.verdict}: {row.text}")  # pytest -s shows what a user would read
    assert row.note == ""
    assert row.verdict != "crash", row.text
    if row.hurts:
        assert row.verdict != "silent"
    assert row.verdict != "wrong", row.text


def test_every_fault_of_the_trainer_can_be_planted(bench: Bench) -> None:
    """A fault replaces a function of the product: one that no longer fits raises, and the doctor is blamed for it."""
    pair = bench.pair("qwen2-untied", "float32")
    rows = [trajectory(prompt(n), sampled(n), 0.0, {}) for n in (3, 5)]
    tried = 0
    for fault in FAULTS.values():
        if (
            fault.side == "trainer"
            and "qwen2-untied" in fault.models
            and fault.setting == "plain"
            and not fault.prepare
        ):
            with fault.plant(pair):
                pair.learner.logprobs(collate(rows))
            tried += 1
    assert tried > 20


def test_the_draws_of_one_rank_s_micro_batches_are_those_of_a_pass_of_their_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = bench.pair("qwen2-untied", "float32").learner
    batch = collate([trajectory(prompt(n), sampled(m), 0.0, {}) for n, m in ((3, 2), (5, 7), (4, 1), (9, 4))])
    monkeypatch.setattr(TrainerConfig, "tokens_per_pass", lambda *_: 8)
    logprobs, _, one = learner.sampled(batch, [9], None)
    assert torch.equal(logprobs, learner.logprobs(batch))
    with monkeypatch.context() as two:
        two.setattr(Rank, "ranks", 2)
        other = learner.sampled(batch, [9], None)[2]
    assert one is not None
    assert other is not None
    numbers, expected = asdict(one), asdict(other)
    assert numbers.pop("likelier") == expected.pop("likelier")
    assert numbers == pytest.approx(expected, rel=1e-4, abs=1e-4)
    batch = replace(batch, rollout_logprobs=batch.rollout_logprobs * torch.nan)
    assert learner.sampled(batch, [9], None)[2] is None


def prompt(n: int) -> Prompt:
    return Prompt(ordinal=n, token_ids=[*range(5, 5 + n)], task={})


def sampled(n: int) -> Completion:
    return Completion(token_ids=[*range(9, 9 + n)], logprobs=[-1.0] * n, versions=[0] * n, finish_reason="length")


@pytest.fixture(scope="module")
def clean_bench() -> Iterator[CleanBench]:
    one = CleanBench()
    yield one
    one.close()


@pytest.mark.nightly
@pytest.mark.parametrize("run", clean_runs(), ids=lambda run: run.name)
def test_an_odd_but_legal_run_has_no_fault(clean_bench: CleanBench, run: CleanRun) -> None:
    assert clean_bench.faults(run) == []
