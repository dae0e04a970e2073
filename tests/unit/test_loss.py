"""The whole loss of a micro-batch: what is added to every objective, and the numbers every step reports."""

import math
from dataclasses import dataclass, replace
from math import log

import pytest
import torch

from rl.loss import full_loss
from rl.objectives import GRPO, GSPO, PPO
from rl.objectives.corrections import IcePop, TokenTIS, Uncorrected
from rl.parity.mismatch import finish, mismatch
from rl.reduce import Meter
from rl.types import Batch, PolicyOutput, Step

OBJECTIVES = pytest.mark.parametrize("objective", [GRPO(), GSPO(), PPO()], ids=["GRPO", "GSPO", "PPO"])
NOW = torch.tensor([[-1.0, -0.5, -2.0], [-0.2, -1.5, -0.7]])
ADVANTAGES = torch.tensor([[1.0, 1.0, 1.0], [-0.5, -0.5, -0.5]])


def batch_of(old=NOW - 0.01, rollout=NOW, ref=None):
    return (Batch if old is None else Step)(
        input_ids=torch.zeros(2, 4, dtype=torch.long),
        mask=torch.ones(2, 3, dtype=torch.bool),
        rollout_logprobs=rollout,
        versions=torch.zeros(2, 3, dtype=torch.long),
        rewards=torch.tensor([1.0, 0.0]),
        group_ids=torch.tensor([0, 0]),
        old_logprobs=old,
        ref_logprobs=ref,
        values=torch.full((2, 3), 0.25),
    )


def policy_of(logprobs=NOW):
    return PolicyOutput(logprobs=logprobs, entropy=torch.full((2, 3), 1.5), values=torch.full((2, 3), 0.4))


@OBJECTIVES
def test_kl_and_entropy_are_added_to_every_objective(objective):
    ref = NOW - torch.tensor([[0.3, -0.2, 0.0], [0.1, 0.1, 0.5]])
    batch = batch_of(ref=ref)
    plain, _ = full_loss(objective, Uncorrected(), policy_of(), batch, ADVANTAGES)
    extended = replace(objective, kl_coef=0.1, kl_estimator="k1", entropy_coef=0.01)
    got, metrics = full_loss(extended, Uncorrected(), policy_of(), batch, ADVANTAGES)
    # k1 = log pi - log ref; the bonus is subtracted, for the loss is minimised.
    assert torch.allclose(got - plain, 0.1 * (NOW - ref) - 0.01 * 1.5, atol=1e-6)
    assert torch.allclose(metrics["actor/kl_loss"], NOW - ref)
    assert torch.equal(metrics["actor/entropy"], torch.full((2, 3), 1.5))


def test_the_entropy_bonus_pushes_entropy_up():
    entropy = torch.full((2, 3), 1.5, requires_grad=True)
    policy = PolicyOutput(logprobs=NOW, entropy=entropy)
    full_loss(GRPO(entropy_coef=0.01), Uncorrected(), policy, batch_of(), ADVANTAGES)[0].sum().backward()
    assert entropy.grad.flatten().tolist() == pytest.approx([-0.01] * 6)


def test_entropy_in_the_advantages_lifts_uncertain_tokens_and_turns_none_round():
    entropy = torch.tensor([[0.0, 1.5, 10.0], [0.0, 1.5, 10.0]], requires_grad=True)
    now = NOW.clone().requires_grad_()
    policy = PolicyOutput(logprobs=now, entropy=entropy)
    shaped = GRPO(entropy_coef=0.1, entropy_in="advantages")
    loss, _ = full_loss(shaped, Uncorrected(), policy, batch_of(old=None), ADVANTAGES)
    # A = +1: + 0, + 0.15, + 1 / 2 (not 1.0); A = -0.5: + 0, + 0.15, + 0.25.
    assert torch.allclose(-loss, torch.tensor([[1.0, 1.15, 1.5], [-0.5, -0.35, -0.25]]))
    loss.sum().backward()
    assert entropy.grad is None
    assert torch.allclose(now.grad, loss.detach())
    nothing, _ = full_loss(shaped, Uncorrected(), policy, batch_of(old=None), torch.zeros(2, 3))
    assert not nothing.any()
    assert shaped.may_skip
    assert not GRPO(entropy_coef=0.1).may_skip
    assert not GRPO(entropy_target=0.2).may_skip


def test_what_is_too_far_from_the_engine_is_left_out_with_its_entropy():
    policy = PolicyOutput(logprobs=NOW, entropy=torch.full((2, 3), 1.5))
    batch = batch_of(old=NOW, rollout=NOW - 3.0)
    shaped = GRPO(entropy_coef=0.1, entropy_in="advantages")
    loss, _ = full_loss(shaped, IcePop(), policy, batch, ADVANTAGES)
    assert not loss.any()


@OBJECTIVES
def test_without_old_logprobs_the_ratio_is_exactly_1(objective):
    now = NOW.clone().requires_grad_()
    objective = replace(objective, value_coef=0.0) if isinstance(objective, PPO) else objective
    loss, metrics = full_loss(objective, Uncorrected(), policy_of(now), batch_of(old=None), ADVANTAGES)
    assert torch.equal(loss.detach(), -ADVANTAGES)
    assert metrics["actor/ppo_kl"].abs().max() == 0
    assert metrics["actor/clip_frac"].max() == 0
    loss.sum().backward()
    assert torch.allclose(now.grad, -ADVANTAGES, atol=1e-6)  # not zero: only the old side is detached


def test_correction_weights_scale_the_policy_loss_and_its_gradient():
    rollout = NOW - torch.tensor([[log(1.5), log(0.5), 0.0], [0.0, log(8.0), log(1.2)]])
    w = torch.tensor([[1.5, 0.5, 1.0], [1.0, 2.0, 1.2]])
    now = NOW.clone().requires_grad_()
    batch = batch_of(old=None, rollout=rollout)
    loss, metrics = full_loss(GRPO(), TokenTIS(cap=2.0), policy_of(now), batch, ADVANTAGES)
    assert torch.allclose(loss, -w * ADVANTAGES, atol=1e-6)
    assert torch.allclose(metrics["rollout_corr/weight"], w, atol=1e-6)
    loss.sum().backward()
    assert torch.allclose(now.grad, -w * ADVANTAGES, atol=1e-6)  # the weight itself is not differentiated


def test_correction_weights_leave_the_value_loss_alone():
    batch = batch_of(old=NOW, rollout=NOW - log(1.8))
    plain, _ = full_loss(PPO(), Uncorrected(), policy_of(), batch, ADVANTAGES)
    got, metrics = full_loss(PPO(), TokenTIS(cap=2.0), policy_of(), batch, ADVANTAGES)
    assert metrics["critic/vf_loss"].min() > 0
    assert torch.allclose(got - plain, -0.8 * ADVANTAGES, atol=1e-6)


def test_only_a_correction_reports_weights_and_what_it_rejected():
    rollout = NOW - torch.tensor([[log(1.5), log(0.5), 0.0], [0.0, log(8.0), log(1.2)]])
    _, plain = full_loss(GRPO(), Uncorrected(), policy_of(), batch_of(old=NOW, rollout=rollout), ADVANTAGES)
    assert not {name for name in plain if "weight" in name or "rejected" in name}
    loss, metrics = full_loss(GRPO(), IcePop(high=5.0), policy_of(), batch_of(old=NOW, rollout=rollout), ADVANTAGES)
    w = torch.tensor([[1.5, 0.5, 1.0], [1.0, 0.0, 1.2]])
    assert torch.allclose(loss, -w * ADVANTAGES, atol=1e-6)
    assert torch.allclose(metrics["rollout_corr/weight"], w, atol=1e-6)
    assert metrics["rollout_corr/rejected_frac"].tolist() == [[0, 0, 0], [0, 1, 0]]
    assert metrics["rollout_corr/rollout_is_max"].max() == pytest.approx(8.0), "raw beside what was applied"


def step_of(d, correction):
    """What `finish` makes of a step of one micro-batch per row of d = old - rollout, NOW's rollout, all tokens live."""
    meter = Meter()
    for row in d:
        batch = batch_of(old=NOW + row)
        _, metrics = full_loss(GRPO(), correction, policy_of(), batch, ADVANTAGES)
        one = {n: v[:1] for n, v in metrics.items() if n.startswith("rollout_corr/")}
        meter.add(one, torch.ones(1, 3, dtype=torch.bool))
    return {k.removeprefix("rollout_corr/"): v for k, v in finish(meter.means()).items()}


def test_the_mismatch_of_a_step_by_hand():
    # The trainer says 2, 1/4, 1 and 1, 1, 4 times what the engine said; the capped weights are 2, 1/4, 1 and 1, 1, 2.
    got = step_of(torch.tensor([[log(2.0), log(0.25), 0.0], [0.0, 0.0, log(4.0)]]), TokenTIS(cap=2.0))
    k3 = [1 - log(2), 0.25 - 1 + log(4), 0, 0, 0, 3 - log(4)]
    d = [log(2), log(0.25), 0, 0, 0, log(4)]
    want = {
        "kl": -log(2) / 6,
        "kl_se": sd(d) / 5**0.5,
        "k3_kl": sum(k3) / 6,
        "k3_kl_se": sd(k3) / 5**0.5,
        "logprob_abs_diff_mean": 5 * log(2) / 6,
        "logprob_abs_diff_mean_se": sd([abs(x) for x in d]) / 5**0.5,
        "logprob_abs_diff_max": log(4),
        "rollout_is_mean": 9.25 / 6,
        "rollout_is_max": 4.0,
        "ess": 9.25**2 / (6 * 23.0625),
        "chi2": 23.0625 / 6 - 1,
        "mult_error": (2 + 4 + 1 + 1 + 1 + 4) / 6,
        "mult_error_se": sd([2, 4, 1, 1, 1, 4]) / 5**0.5,
        "outside_frac": 2 / 6,  # 1/4 and 4; 2 is the bound and inside
        "seq_ess": (0.5 + 4) ** 2 / (2 * (0.25 + 16)),
        "weight": 7.25 / 6,
        "weight_ess": 7.25**2 / (6 * 11.0625),
        "rejected_frac": 0.0,
    }
    assert got == {name: pytest.approx(value, abs=1e-6) for name, value in want.items()}


def sd(values):
    mean = sum(values) / len(values)
    return (sum((x - mean) ** 2 for x in values) / len(values)) ** 0.5


def test_in_fp32_the_rounding_of_two_sides_that_agree_is_not_lost_in_that_of_exp():
    # k3 is about d^2 / 2 = 1.25e-11, where e^d - d - 1 in float32 gives multiples of 1e-7 of either sign.
    batch = batch_of(old=torch.full((2, 3), 5e-6), rollout=torch.zeros(2, 3))
    k3 = mismatch(batch)["rollout_corr/k3_kl"]
    assert k3.flatten().tolist() == pytest.approx([1.25e-11] * 6, rel=0.05)


def test_extreme_gaps_are_shown_as_they_are_and_overflow_nothing():
    for d in (200.0, -200.0):
        batch = batch_of(old=torch.full((2, 3), d), rollout=torch.zeros(2, 3))
        metrics = mismatch(batch)
        assert all(v.isfinite().all() for v in metrics.values())
        assert metrics["rollout_corr/logprob_abs_diff_max"].max() == 200
        assert metrics["rollout_corr/rollout_is_max"].max() == pytest.approx(math.exp(math.copysign(20, d)))


def test_a_gap_that_is_not_a_number_is_not_hidden():
    got = step_of(torch.tensor([[0.0, math.nan, 0.0]]), TokenTIS())
    shown = ("kl", "k3_kl", "mult_error", "logprob_abs_diff_mean", "ess", "seq_ess", "rollout_is_mean", "kl_se")
    assert all(math.isnan(got[name]) for name in shown)
    assert got["outside_frac"] == pytest.approx(1 / 3)


def test_the_gap_to_the_engine_shows_also_where_the_engine_s_own_numbers_are_the_old_ones():
    batch = batch_of(old=NOW - 0.5, rollout=NOW - 0.5)
    _, hidden = full_loss(GRPO(), Uncorrected(), policy_of(), batch, ADVANTAGES)
    _, shown = full_loss(GRPO(), Uncorrected(), policy_of(), batch, ADVANTAGES, old_is_rollout=True)
    assert hidden["rollout_corr/kl"].abs().max() == 0
    assert torch.allclose(shown["rollout_corr/kl"], torch.tensor(-0.5))
    assert torch.equal(hidden["actor/ppo_kl"], shown["actor/ppo_kl"])


def test_no_gradient_flows_through_the_mismatch():
    now = NOW.clone().requires_grad_()
    metrics = full_loss(GRPO(), TokenTIS(), policy_of(now), batch_of(), ADVANTAGES, old_is_rollout=True)[1]
    assert not [n for n, v in metrics.items() if n.startswith("rollout_corr/") and v.requires_grad]


def test_where_every_weight_is_0_nothing_counts():
    got = step_of(torch.full((2, 3), log(8.0)), IcePop(high=5.0))
    assert (got["weight"], got["weight_ess"], got["rejected_frac"]) == (0.0, 0.0, 1.0)
    assert got["ess"] == pytest.approx(1.0)


def test_explained_variance_compares_variances_of_residual_and_returns():
    # Returns 1, 2, 3 (variance 2/3), residuals 0, 0, 1 (variance 2/9).
    means = {"critic/returns": 2.0, "critic/returns_sq": 14 / 3, "critic/residual": 1 / 3, "critic/residual_sq": 1 / 3}
    out = finish(means)
    assert out == {"critic/returns": 2.0, "critic/vf_explained_var": pytest.approx(2 / 3)}


def test_returns_that_are_all_equal_explain_nothing_rather_than_everything():
    means = {"critic/returns": 1.0, "critic/returns_sq": 1.0, "critic/residual": 0.5, "critic/residual_sq": 0.25}
    assert math.isnan(finish(means)["critic/vf_explained_var"])


def test_a_reduced_loss_is_refused_with_the_name_of_its_objective():
    @dataclass(frozen=True, kw_only=True)
    class Averaged(GRPO):
        def loss(self, policy, batch, advantages):
            return super().loss(policy, batch, advantages)[0].mean(dim=1), {}

    with pytest.raises(ValueError, match=r"Averaged\.loss returned shape \(2,\).*\[B, T\]=\(2, 3\)"):
        full_loss(Averaged(), Uncorrected(), policy_of(), batch_of(), ADVANTAGES)
