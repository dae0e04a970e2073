"""The whole loss of a micro-batch: what is added to every objective, and the numbers every step reports."""

import math
from dataclasses import dataclass, replace
from math import exp, log

import pytest
import torch

from rl.corrections import TruncatedIS
from rl.loss import finish, full_loss, mismatch
from rl.objectives import GRPO, GSPO, PPO
from rl.types import Batch, PolicyOutput

OBJECTIVES = pytest.mark.parametrize("objective", [GRPO(), GSPO(), PPO()], ids=["GRPO", "GSPO", "PPO"])
NOW = torch.tensor([[-1.0, -0.5, -2.0], [-0.2, -1.5, -0.7]])
ADVANTAGES = torch.tensor([[1.0, 1.0, 1.0], [-0.5, -0.5, -0.5]])


def batch_of(old=NOW - 0.01, rollout=NOW, ref=None):
    return Batch(
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
    plain, _ = full_loss(objective, None, policy_of(), batch, ADVANTAGES)
    extended = replace(objective, kl_coef=0.1, kl_estimator="k1", entropy_coef=0.01)
    got, metrics = full_loss(extended, None, policy_of(), batch, ADVANTAGES)
    # k1 = log pi - log ref; the bonus is subtracted, for the loss is minimised.
    assert torch.allclose(got - plain, 0.1 * (NOW - ref) - 0.01 * 1.5, atol=1e-6)
    assert torch.allclose(metrics["actor/kl_loss"], NOW - ref)
    assert torch.equal(metrics["actor/entropy"], torch.full((2, 3), 1.5))


def test_the_entropy_bonus_pushes_entropy_up():
    entropy = torch.full((2, 3), 1.5, requires_grad=True)
    policy = PolicyOutput(logprobs=NOW, entropy=entropy)
    full_loss(GRPO(entropy_coef=0.01), None, policy, batch_of(), ADVANTAGES)[0].sum().backward()
    assert entropy.grad.flatten().tolist() == pytest.approx([-0.01] * 6)


@OBJECTIVES
def test_without_old_logprobs_the_ratio_is_exactly_1(objective):
    now = NOW.clone().requires_grad_()
    objective = replace(objective, value_coef=0.0) if isinstance(objective, PPO) else objective
    loss, metrics = full_loss(objective, None, policy_of(now), batch_of(old=None), ADVANTAGES)
    assert torch.equal(loss.detach(), -ADVANTAGES)
    assert metrics["actor/ppo_kl"].abs().max() == 0
    assert metrics["actor/clip_frac"].max() == 0
    loss.sum().backward()
    assert torch.allclose(now.grad, -ADVANTAGES, atol=1e-6)  # not zero: only the old side is detached


def test_token_weights_are_capped_ratios_of_old_to_rollout():
    old = NOW + torch.tensor([[log(1.5), log(4.0), 0.0], [log(0.5), 0.0, log(2.5)]])
    got = TruncatedIS(level="token", cap=2.0).weights(batch_of(old=old))
    assert got.flatten().tolist() == pytest.approx([1.5, 2.0, 1.0, 0.5, 1.0, 2.0])


def test_sequence_weights_are_the_geometric_mean_over_sampled_tokens():
    old = NOW + torch.tensor([[0.3, 0.6, 99.0], [-0.2, -0.4, -0.6]])
    batch = replace(batch_of(old=old), mask=torch.tensor([[True, True, False], [True, True, True]]))
    got = TruncatedIS(level="sequence", cap=1.5).weights(batch)
    assert got[0, :2].tolist() == pytest.approx([1.5, 1.5])  # exp(0.45) = 1.57 is capped
    assert got[1].tolist() == pytest.approx([exp(-0.4)] * 3)


def test_correction_weights_scale_the_policy_loss_and_its_gradient():
    rollout = NOW - torch.tensor([[log(1.5), log(0.5), 0.0], [0.0, log(8.0), log(1.2)]])
    w = torch.tensor([[1.5, 0.5, 1.0], [1.0, 2.0, 1.2]])
    now = NOW.clone().requires_grad_()
    batch = batch_of(old=None, rollout=rollout)
    loss, metrics = full_loss(GRPO(), TruncatedIS(cap=2.0), policy_of(now), batch, ADVANTAGES)
    assert torch.allclose(loss, -w * ADVANTAGES, atol=1e-6)
    assert torch.allclose(metrics["rollout_corr/weight"], w, atol=1e-6)
    loss.sum().backward()
    assert torch.allclose(now.grad, -w * ADVANTAGES, atol=1e-6)  # the weight itself is not differentiated


def test_correction_weights_leave_the_value_loss_alone():
    batch = batch_of(old=NOW, rollout=NOW - log(1.8))
    plain, _ = full_loss(PPO(), None, policy_of(), batch, ADVANTAGES)
    got, metrics = full_loss(PPO(), TruncatedIS(cap=2.0), policy_of(), batch, ADVANTAGES)
    assert metrics["critic/vf_loss"].min() > 0
    assert torch.allclose(got - plain, -0.8 * ADVANTAGES, atol=1e-6)


def test_mismatch_numbers_of_two_tokens_by_hand():
    # The trainer says twice, and a quarter, of what the engine said.
    d = torch.tensor([[log(2.0), log(0.25), 0.0]]).repeat(2, 1)
    got = {k.removeprefix("rollout_corr/"): v[0].tolist() for k, v in mismatch(batch_of(old=NOW + d)).items()}
    assert got["kl"] == pytest.approx([-log(2), log(4), 0], abs=1e-6)
    assert got["k3_kl"] == pytest.approx([1 - log(2), 0.25 + log(4) - 1, 0], abs=1e-6)
    assert got["logprob_abs_diff_mean"] == pytest.approx([log(2), log(4), 0], abs=1e-6)
    assert got["logprob_abs_diff_max"] == got["logprob_abs_diff_mean"]
    assert got["rollout_is_mean"] == pytest.approx([2, 0.25, 1])
    assert got["rollout_is_max"] == got["rollout_is_mean"]
    assert got["rollout_is_sq"] == pytest.approx([4, 0.0625, 1])


def test_the_effective_sample_size_of_weights_1_2_3_is_six_sevenths():
    # (1 + 2 + 3)^2 / (3 * (1 + 4 + 9)) = 36 / 42.
    out = finish({"rollout_corr/rollout_is_mean": 2.0, "rollout_corr/rollout_is_sq": 14 / 3})
    assert out == {"rollout_corr/rollout_is_mean": 2.0, "rollout_corr/ess": pytest.approx(6 / 7)}


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
        full_loss(Averaged(), None, policy_of(), batch_of(), ADVANTAGES)
