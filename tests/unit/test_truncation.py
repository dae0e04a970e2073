"""Which tokens truncation keeps: literal masks, and vLLM's own functions."""

import re

import pytest
import torch

import rl.sampling.truncation
from rl.config import Config, RolloutConfig
from rl.sampling.truncation import Truncation, keep
from rl.types import Data


def kept(probabilities, **truncation):
    """Indices kept of one row, given by its probabilities."""
    logits = torch.tensor([probabilities]).log()
    return keep(logits, Truncation(**truncation))[0].nonzero()[:, 0].tolist()


ROW = [0.05, 0.4, 0.1, 0.25, 0.2]


def test_nothing_is_cut_off_by_default():
    assert kept(ROW) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("k", "want"), [(1, [1]), (2, [1, 3]), (4, [1, 2, 3, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_top_k_keeps_the_k_most_likely(k, want):
    assert kept(ROW, top_k=k) == want


def test_top_k_keeps_all_that_tie_with_the_last():
    assert kept([0.1, 0.25, 0.25, 0.25, 0.15], top_k=2) == [1, 2, 3]


@pytest.mark.parametrize(
    ("p", "want"),
    [
        (0.3, [1]),  # 0.4 alone is enough
        (0.5, [1, 3]),  # 0.4 is not, 0.65 is: the token that crosses the line is kept
        (0.7, [1, 3, 4]),
        (0.9, [1, 2, 3, 4]),
        (0.99, [0, 1, 2, 3, 4]),
        (1e-6, [1]),  # never none
    ],
)
def test_top_p_keeps_the_most_likely_until_they_add_up_to_p(p, want):
    assert kept(ROW, top_p=p) == want


def test_top_p_drops_a_tail_of_exactly_1_minus_p():
    # Powers of two, so that sums are exact: the tail of 0.125 + 0.125 is 1 - 0.75 and goes; one bit less, and it stays.
    row = [0.5, 0.125, 0.25, 0.125]
    assert kept(row, top_p=0.75) == [0, 2]
    assert len(kept(row, top_p=0.75 + 2**-20)) == 3
    assert kept(row, top_p=0.5) == [0]


def test_top_p_adds_up_what_top_k_left():
    # Of all, 0.4 + 0.25 + 0.2 are 0.85 < 0.9; of the three that top-k leaves, 0.4 + 0.25 are 0.76 < 0.9 and all stay;
    # at 0.7 the two suffice, which without top-k are 0.65 and do not.
    assert kept(ROW, top_k=3, top_p=0.9) == [1, 3, 4]
    assert kept(ROW, top_k=3, top_p=0.7) == [1, 3]
    assert kept(ROW, top_p=0.7) == [1, 3, 4]


def test_min_p_is_relative_to_the_most_likely():
    assert kept(ROW, min_p=0.49) == [1, 3, 4]  # at least 0.196
    assert kept(ROW, min_p=0.51) == [1, 3]
    assert kept([0.5, 0.125, 0.25, 0.125], min_p=0.5) == [0, 2]  # the limit itself stays
    assert kept([0.4, 0.4, 0.2], min_p=1.0) == [0, 1]


def test_min_p_comes_before_top_k_and_top_p():
    # min_p leaves 0.4, 0.25 and 0.2, 0.85 in all: of these 0.65 are 0.76, enough for 0.75 and of all tokens not.
    assert kept(ROW, min_p=0.49, top_p=0.75) == [1, 3]
    assert kept(ROW, top_p=0.75) == [1, 3, 4]
    assert kept(ROW, min_p=0.49, top_k=4) == [1, 3, 4]


def test_every_row_is_judged_by_itself():
    rows = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.45, 0.45]]).log()
    assert keep(rows, Truncation(top_p=0.6)).tolist() == [[True, False, False], [False, True, True]]


def test_the_logits_are_left_as_they_were():
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    keep(logits, Truncation(top_p=0.9, top_k=50, min_p=0.01))
    assert torch.equal(logits, before)


def vllm_keeps(logits, truncation):
    """What vLLM's CPU sampler leaves: its min-p lines, and its own function for top-k and top-p."""
    from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    n, v = logits.shape
    logits = logits.clone()
    min_p = MinPLogitsProcessor.__new__(MinPLogitsProcessor)
    min_p.min_p_count, min_p.min_p = int(truncation.min_p > 0), torch.full((n, 1), truncation.min_p)
    logits = min_p.apply(logits)
    k = torch.full((n,), truncation.top_k, dtype=torch.int32) if 0 < truncation.top_k < v else None
    p = torch.full((n,), truncation.top_p) if truncation.top_p < 1 else None
    return apply_top_k_top_p_pytorch(logits, k, p, allow_cpu_sync=True) > -torch.inf


SETTINGS = [
    Truncation(top_p=0.9),
    Truncation(top_p=0.1),
    Truncation(top_p=0.999),
    Truncation(top_k=20),
    Truncation(top_k=1),
    Truncation(top_k=3, top_p=0.5),
    Truncation(top_k=1500, top_p=0.97),
    Truncation(min_p=0.2),
    Truncation(min_p=0.02, top_k=40, top_p=0.8),
    Truncation(min_p=0.3, top_p=0.95),
]


@pytest.mark.slow
@pytest.mark.parametrize("truncation", SETTINGS, ids=str)
@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shortlist", [1024, 64])
def test_vllm_keeps_the_same(truncation, spread, tied, shortlist, monkeypatch):
    monkeypatch.setattr(rl.sampling.truncation, "SHORTLIST", shortlist)
    logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(1)) * spread
    if tied:
        logits = (logits * 2).round() / 2
    ours, theirs = keep(logits, truncation), vllm_keeps(logits, truncation)
    assert not theirs.all()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("spread", [0.3, 6.0])
def test_a_shortlist_decides_what_it_can_and_a_sort_the_rest(spread, monkeypatch):
    sorted_rows = []
    sort = rl.sampling.truncation._sorted_nucleus

    def counted(x, *rest):
        sorted_rows.append(len(x))
        return sort(x, *rest)

    monkeypatch.setattr(rl.sampling.truncation, "_sorted_nucleus", counted)
    keep(torch.randn(40, 5000, generator=torch.Generator().manual_seed(1)) * spread, Truncation(top_p=0.9))
    assert sorted_rows == [{0.3: 40, 6.0: 0}[spread]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_p": 0.0}, "rollout.top_p=0.0 must be above 0 and at most 1 (1 is off)"),
        ({"top_p": 1.1}, "rollout.top_p=1.1 must be above 0 and at most 1"),
        ({"top_p": float("nan")}, "rollout.top_p=nan"),
        ({"top_k": -1}, "rollout.top_k=-1 must be at least 1, or 0 (which is off)"),
        ({"min_p": -0.1}, "rollout.min_p=-0.1 must be between 0 (which is off) and 1"),
        ({"min_p": 1.5}, "rollout.min_p=1.5"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Truncation(**values).check()


def test_values_at_their_limits_pass():
    Truncation(top_p=1.0, top_k=0, min_p=0.0).check()
    Truncation(top_p=1e-3, top_k=1, min_p=1.0).check()


def config_of(**rollout):
    rollout = RolloutConfig(**rollout)
    return Config(name="t", model="m", data=lambda: Data(train=[]), reward=lambda r: 0.0, rollout=rollout)


@pytest.mark.slow
def test_engines_on_gpus_report_what_they_kept_when_something_is_cut_off():
    from rollout.settings import engine_args

    def asked(device, **rollout):
        return engine_args(config_of(**rollout), device=device, backend="nccl", model="m")["return_sampling_mask"]

    assert asked("cuda", top_k=20)
    assert not asked("cuda")
    # Model Runner V2 alone can do it, and vLLM on CPU has none: it would refuse to start.
    assert not asked("cpu", top_k=20)


@pytest.mark.slow
def test_an_engine_of_several_gpus_has_workers_of_its_own_not_rays():
    from rollout.settings import engine_args

    def executor(tensor_parallel):
        config = config_of(tensor_parallel=tensor_parallel)
        return engine_args(config, device="cuda", backend="nccl", model="m")["distributed_executor_backend"]

    assert [executor(1), executor(2)] == [None, "mp"]


def said(support):
    """vLLM's own output of the tokens 7 and 9, with what it kept for each."""
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, SamplingMask, WeightVersionSpan

    return CompletionOutput(
        index=0,
        text="",
        token_ids=[7, 9],
        cumulative_logprob=None,
        logprobs=[{7: Logprob(-0.5)}, {9: Logprob(0.0)}],
        finish_reason="stop",
        weight_versions=[WeightVersionSpan(start=0, end=2, version="3")],
        sampling_mask=None if support is None else SamplingMask(support),
    )


@pytest.mark.slow
def test_what_the_engine_kept_arrives_with_its_tokens():
    from rollout.completion import completion

    assert completion(said([[4, 7], [9]]), 3, 0).support == [[4, 7], [9]]
    assert completion(said(None), 3, 0).support is None
    with pytest.raises(AssertionError, match="sampled a token outside of the set that it reports as kept"):
        completion(said([[4, 7], [8]]), 3, 0)
    with pytest.raises(ValueError, match="shorter"):
        completion(said([[4, 7]]), 3, 0)


@pytest.mark.slow
def test_a_mask_or_experts_that_the_engine_owes_and_does_not_give_end_the_run_with_the_remedy():
    import asyncio
    from types import SimpleNamespace

    from rollout.engine import Engine

    async def answer(token_ids, params):
        return SimpleNamespace(finished=True, outputs=[said(None)], num_cached_tokens=0)

    def engine(owes, replays=False):
        made = object.__new__(Engine)
        made.config = SimpleNamespace(rollout=SimpleNamespace(router_replay=replays))
        made.llm, made.aborted, made.generate = (
            SimpleNamespace(model_config=SimpleNamespace(return_sampling_mask=owes)),
            0,
            answer,
        )
        return made

    assert asyncio.run(engine(False)._complete([1], temperature=1.0)).support is None
    with pytest.raises(RuntimeError, match="did not report which tokens it kept"):
        asyncio.run(engine(True)._complete([1], temperature=1.0))
    with pytest.raises(RuntimeError, match=r"experts of a reply.s tokens\. Set rollout\.router_replay=False"):
        asyncio.run(engine(False, replays=True)._complete([1], temperature=1.0))
