"""The contract checker: every objective of ours keeps the contract, and every planted mistake is named."""

import inspect
import linecache
from dataclasses import dataclass, replace

import pytest
import torch

import more_right_objectives
import more_wrong_objectives as more
import wrong_objectives
from right_objectives import ACCEPTED
from rl.contract.check import CHECKS, assert_objective, check_objective
from rl.objectives import CISPO, FAMILY, GRPO, GSPO, M2PO, PPO, ReinforcePP
from rl.objectives.ratios import ratio_of
from rl.reduce import Totals, loss_weights, masked_mean
from wrong_objectives import CASES, moved, planted, right


def gate(cases, first):
    """Parameters of which all but the first of each kind are nightly; `first` gives the kind."""
    seen = set()
    for name, case in cases:
        marks = [pytest.mark.nightly] if first(case) in seen else []
        seen.add(first(case))
        yield pytest.param(case, id=name, marks=marks)


def broken(objective):
    return {f.check for f in check_objective(objective)}


VARIANTS = [
    *(each(kl_coef=0.1, entropy_coef=0.01) for each in (GRPO, GSPO, CISPO, PPO, M2PO)),
    *(each(kl_coef=0.1, kl_in="reward", kl_estimator="k1") for each in (GRPO, PPO, ReinforcePP)),
    *(each(dual_clip=3.0) for each in (GRPO, GSPO, PPO)),
    *(replace(GSPO(), clip_low=0.2, clip_high=0.2), replace(PPO(), value_clip=0.01, lam=1.0)),
]


@pytest.mark.parametrize("make", gate([(m.__name__, m) for m in FAMILY], lambda m: m.uses_values))
def test_every_objective_of_ours_keeps_the_contract(make):
    assert not [str(f) for f in check_objective(make())]


@pytest.mark.parametrize("objective", gate([(type(o).__name__, o) for o in VARIANTS], lambda o: o.kl_in == "loss"))
def test_no_setting_breaks_the_contract(objective):
    assert not [str(f) for f in check_objective(objective, seed=1)]


@pytest.mark.parametrize(
    "make", gate([(m.__name__, m) for m in ACCEPTED], lambda m: (m.uses_values, m.skippable, bool(m.on_purpose)))
)
def test_what_is_unusual_and_right_is_accepted(make):
    assert not [str(f) for f in check_objective(make())]


@pytest.mark.slow
@pytest.mark.parametrize("case", gate([(c.name, c) for c in CASES], lambda c: c.check))
def test_a_planted_mistake_is_named_alone_with_its_line(case):
    found = check_objective(case.make())
    assert {f.check for f in found} == set(case.check.split("+"))
    assert case.words in str(found[0])
    if case.line:
        name, _, line = found[0].place.partition(", line ")
        assert name == "wrong_objectives.py"
        assert case.line in linecache.getline(wrong_objectives.__file__, int(line))


def test_every_check_is_shown_to_find_something():
    names = {case.check for case in CASES}
    assert names >= {
        *("NaN", "empty mask", "pure", "columns", "row order", "mask", "position", "micro-batches", "groups", "sign"),
        *("policy gradient", "extreme ratios", "penalty", "entropy", "critic", "zero advantage", "bounds"),
        *("finite differences", "shape", "metrics", "runs", "episodes"),
    }
    assert more.CASES is CASES
    assert more_right_objectives.right.__module__ == "right_objectives"
    assert len(CASES) >= 80
    assert len(ACCEPTED) >= 45
    assert len(CHECKS) == len(set(CHECKS))


def test_the_loss_that_the_mistakes_were_planted_in_is_right():
    assert not check_objective(planted(loss=lambda self, policy, batch, a: (right(policy, batch, a), {})))


DECLARED = {
    "clipped_on_both_sides": {"on_purpose": ("bounds",)},
    "baseline_of_the_step": {"group_relative": False},
    "penalty_not_declared": {"skippable": False},
    "half_detached": {"stop_gradient": True},
}


@pytest.mark.parametrize("name", gate([(name, name) for name in DECLARED], lambda name: None))
def test_a_declaration_accepts_what_is_meant(name):
    wrong = next(case.make() for case in CASES if case.name == name)
    made = dataclass(frozen=True, kw_only=True)(type("Declared", (type(wrong),), DECLARED[name]))
    assert not broken(made(**vars(wrong)))


def test_only_a_matter_of_choice_can_be_declared():
    (found,) = check_objective(planted(on_purpose=("mask",)))
    assert "`on_purpose` names 'mask', which no objective may break" in found.what


@pytest.mark.parametrize(
    ("reads", "flag"),
    [
        (lambda policy, batch: batch.ref_logprobs, "uses_reference"),
        pytest.param(lambda policy, batch: batch.values, "uses_values", marks=pytest.mark.nightly),
        pytest.param(lambda policy, batch: policy.values, "uses_values", marks=pytest.mark.nightly),
    ],
)
def test_what_a_loss_reads_without_declaring_it_is_named_with_its_flag(reads, flag):
    def loss(self, policy, batch, advantages):
        return right(policy, batch, advantages) + 0.01 * (policy.logprobs - reads(policy, batch).detach()) ** 2, {}

    (violation,) = check_objective(planted(loss=loss))
    assert violation.check == "declares"
    assert f"Declare `{flag}: ClassVar[bool] = True`" in violation.remedy
    assert "loss(policy, batch, advantages) reads" in violation.what


@pytest.mark.parametrize(
    "advantages",
    [
        lambda self, batch: batch.rewards,
        lambda self, batch: batch.rewards[:, None],
        lambda self, batch: batch.mask.float().mean(dim=0),
    ],
    ids=["[B]", "[B, 1]", "[T]"],
)
def test_advantages_of_another_shape_are_named(advantages):
    assert broken(planted(advantages=advantages)) == {"shape"}


@pytest.mark.parametrize(
    "reduce",
    [lambda x: x.mean(), lambda x: x.sum(dim=1), lambda x: x.sum(dim=1, keepdim=True), lambda x: x.mean(dim=0)],
)
def test_a_loss_of_another_shape_is_named(reduce):
    def loss(self, policy, batch, advantages):
        return reduce(right(policy, batch, advantages)), {}

    assert broken(planted(loss=loss)) == {"shape"}


@pytest.mark.parametrize(
    ("metric", "found"),
    [
        pytest.param(lambda r, mask: r.detach(), set(), marks=pytest.mark.nightly),
        (lambda r, mask: masked_mean(r, mask).detach(), set()),
        (lambda r, mask: r, {"metrics"}),
        (lambda r, mask: r.mean().detach(), {"metrics"}),
        (lambda r, mask: r.mean().detach().expand(len(r)), {"mask"}),
        (lambda r, mask: r.detach() / mask.sum().clamp(min=1), {"micro-batches"}),
    ],
    ids=["token", "sequence", "graph", "reduced", "reduced and spread", "own denominator"],
)
def test_metrics_have_a_shape_no_graph_and_no_denominator_of_their_own(metric, found):
    def loss(self, policy, batch, advantages):
        return right(policy, batch, advantages), {"mine": metric(ratio_of(moved(policy, batch)), batch.mask)}

    assert broken(planted(loss=loss)) == found


def test_the_helper_for_tests_raises_with_every_violation():
    assert_objective(GSPO())
    twice = next(c for c in CASES if c.name == "maximised").make()
    with pytest.raises(
        AssertionError, match=r"Planted breaks its contract:\n- sign: .*\[wrong_objectives.py, line \d+\]"
    ):
        assert_objective(twice)


# -- settings that would be dropped, or that nothing knows -------------------------------------------------------------


def declared(**members):
    return dataclass(frozen=True, kw_only=True)(type("Mine", (GRPO,), members))


def test_an_average_that_does_not_exist_is_refused_when_the_objective_is_made_and_when_it_is_used():
    loose = declared(average_over="token", __annotations__={"average_over": str})
    with pytest.raises(ValueError, match=r"average_over='token' is not one of 'tokens', 'sequences', 'constant'"):
        loose()
    with pytest.raises(ValueError, match=r"average_over='token' is not one of 'tokens', 'sequences', 'constant'"):
        inspect.unwrap(loss_weights)(torch.ones(1, 2).bool(), "token", Totals(tokens=2, sequences=1, horizon=2))


def test_a_default_that_python_would_drop_is_refused():
    with pytest.raises(ValueError, match=r"average_over = 'sequences' in Mine has no type.*: write average_over: Lit"):
        declared(average_over="sequences")()
    bare = type("Bare", (GRPO,), {"clip_low": 0.9, "__annotations__": {"clip_low": float}})
    with pytest.raises(ValueError, match=r"Bare declares clip_low, and is no dataclass: write @dataclass\(frozen=True"):
        bare()
