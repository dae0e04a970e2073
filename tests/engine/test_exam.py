"""Faults that the doctor was not built on are named, and runs that are odd but right are not."""

from collections.abc import Iterator

import pytest

from cases import nightly_unless
from clean_runs import CleanBench, CleanRun, clean_runs
from exam import Bench, rows, run_row
from planted import FAULTS
from planted_fault import Fault

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


@pytest.fixture(scope="module")
def clean_bench() -> Iterator[CleanBench]:
    one = CleanBench()
    yield one
    one.close()


@pytest.mark.nightly
@pytest.mark.parametrize("run", clean_runs(), ids=lambda run: run.name)
def test_an_odd_but_legal_run_has_no_fault(clean_bench: CleanBench, run: CleanRun) -> None:
    assert clean_bench.faults(run) == []
