"""The rest of the family, each objective against numbers derived by hand beside its formula."""

from math import exp, log, sqrt

import pytest
import torch

from rl.loss import critic_alone, full_loss, prepare
from rl.objectives import (
    CISPO,
    DAPO,
    FAMILY,
    GMPO,
    GRPO,
    GSPO,
    M2PO,
    OPO,
    PPO,
    RLOO,
    SAPO,
    DrGRPO,
    ReinforcePP,
    ReinforcePPBaseline,
)
from rl.objectives.corrections import IcePop, Uncorrected
from rl.reduce import Totals, loss_weights
from rl.types import PolicyOutput, Step

ALL = torch.ones(2, 3, dtype=torch.bool)
MASK = torch.tensor([[True, True, True], [False, True, True]])
OLD = torch.full((2, 3), -2.0)


def batch_of(mask=MASK, old=OLD, rewards=(1.0, 0.0), group_ids=(0, 0), rollout=None, ref=None, values=None):
    return Step(
        input_ids=torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.long),
        mask=mask,
        rollout_logprobs=old if rollout is None else rollout,
        versions=torch.zeros(mask.shape, dtype=torch.long),
        rewards=torch.tensor(rewards),
        group_ids=torch.tensor(group_ids),
        old_logprobs=old,
        ref_logprobs=ref,
        values=values,
    )


def loss_of(objective, ratio, advantages, mask=ALL, old=OLD):
    """Per-token loss and metrics for ratios and advantages, and the gradient of the loss's sum."""
    now = (old + torch.tensor(ratio).log()).requires_grad_()
    policy = PolicyOutput(logprobs=now, entropy=torch.zeros_like(now))
    loss, metrics = objective.loss(policy, batch_of(mask, old), torch.tensor(advantages))
    torch.where(mask, loss, 0.0).sum().backward()
    return loss.detach().flatten().tolist(), metrics, now.grad.flatten().tolist()


def close(values):
    return pytest.approx(values, abs=1e-6)


def test_dapo_clips_higher_and_averages_over_tokens():
    loss, metrics, _ = loss_of(DAPO(), [[1.5, 0.5, 1.25], [1.5, 0.5, 1.0]], [[1.0, 1.0, 1.0], [-2.0, -2.0, -2.0]])
    # A > 0: min(r, 1.28) A; A < 0: max(r, 0.8) A.
    assert loss == close([-1.28, -0.5, -1.25, 3.0, 1.6, 2.0])
    assert metrics["actor/clip_frac"].tolist() == [[1, 0, 0], [0, 1, 0]]
    assert DAPO().average_over == "tokens"


def test_dr_grpo_is_reward_minus_group_mean_over_a_constant_length():
    objective = DrGRPO()
    batch = batch_of(rewards=(4.0, 1.0))
    _, advantages = prepare(objective, batch)
    assert advantages.tolist() == [[1.5, 1.5, 1.5], [0.0, -1.5, -1.5]]
    policy = PolicyOutput(logprobs=OLD, entropy=torch.zeros(2, 3))
    loss, _ = objective.loss(policy, batch, advantages)
    weights = loss_weights(MASK, objective.average_over, Totals(tokens=5, sequences=2, horizon=8))
    # The sum over tokens, over 2 sequences of at most 8 tokens: -(3 * 1.5 - 2 * 1.5) / 16.
    assert float((loss * weights).sum()) == close(-1.5 / 16)


@pytest.mark.parametrize("make", [GRPO, PPO], ids=["GRPO", "PPO"])
def test_dual_clip_bounds_the_loss_of_a_bad_token_that_became_likely(make):
    ratio, advantages = [[5.0, 2.0, 5.0], [0.5, 3.0, 40.0]], [[-2.0, -2.0, 1.0], [-1.0, -1.0, -1.0]]
    # A < 0: -max(min(r A, max(r, 0.8) A), 3 A); A > 0: as without.
    if make is GRPO:
        loss, metrics, grad = loss_of(GRPO(dual_clip=3.0), ratio, advantages)
        assert loss == close([6.0, 4.0, -1.2, 0.8, 3.0, 3.0])
        assert metrics["actor/clip_frac_dual"].tolist() == [[1, 0, 0], [0, 0, 1]]
        assert grad == close([0.0, 4.0, 0.0, 0.0, 3.0, 0.0])
    with pytest.raises(ValueError, match=r"dual_clip=1 must be above 1, e\.g\. 3\.0, or None"):
        make(dual_clip=1.0)


def test_rloo_is_unclipped_and_compares_with_the_others():
    mask = torch.ones(3, 1, dtype=torch.bool)
    batch = batch_of(mask, OLD[:1].expand(3, 3)[:, :1], rewards=(1.0, 0.0, 0.5), group_ids=(4, 4, 4))
    assert RLOO().advantages(batch).flatten().tolist() == close([0.75, -0.75, 0.0])
    loss, _, grad = loss_of(RLOO(), [[9.0, 0.1, 1.0]] * 2, [[1.0, 1.0, 1.0], [-2.0, -2.0, -2.0]])
    assert loss == close([-9.0, -0.1, -1.0, 18.0, 0.2, 2.0])
    assert grad == close(loss)


def test_opo_weighs_its_baseline_by_length():
    # Lengths 3 and 2, rewards 1 and 0: baseline 3/5.
    assert OPO().advantages(batch_of()).flatten().tolist() == close([0.4, 0.4, 0.4, 0.0, -0.6, -0.6])


def test_reinforce_pp_is_normalised_over_all_tokens_of_the_step():
    # Rewards to come: 1, 1, 1 and 0, 0: mean 3/5, variance 6/25.
    sd = sqrt(0.24)
    got = ReinforcePP().advantages(batch_of()).flatten().tolist()
    assert got == close([0.4 / sd, 0.4 / sd, 0.4 / sd, 0.0, -0.6 / sd, -0.6 / sd])


def test_reinforce_pp_sums_the_kl_still_to_come():
    ref = OLD - torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.4, 0.0]])
    _, got = prepare(ReinforcePP(kl_coef=0.5), batch_of(ref=ref))
    # k1 = log old - log ref; paid -0.05, -0.1, 1 - 0.15 and -0.2, 0; to come 0.7, 0.75, 0.85 and -0.2, 0.
    to_come = torch.tensor([0.7, 0.75, 0.85, -0.2, 0.0])
    want = (to_come - to_come.mean()) / to_come.std(unbiased=False)
    assert got[MASK].tolist() == close(want.tolist())


def test_reinforce_pp_baseline_subtracts_the_group_s_mean_and_divides_by_the_step_s_deviation():
    mask = torch.ones(4, 1, dtype=torch.bool)
    batch = batch_of(mask, OLD[:1, :1].expand(4, 1), rewards=(1.0, 5.0, 0.0, 3.0), group_ids=(0, 1, 0, 1))
    # Centred 0.5, 1, -0.5, -1: mean 0, variance 2.5 / 4.
    want = [0.5 / sqrt(0.625), 1 / sqrt(0.625), -0.5 / sqrt(0.625), -1 / sqrt(0.625)]
    assert ReinforcePPBaseline().advantages(batch).flatten().tolist() == close(want)


def test_cispo_bounds_the_weight_and_keeps_the_gradient():
    old = torch.tensor([[-2.0, -3.0, -1.0]] * 2)
    advantages = [[1.0, 1.0, 1.0], [-2.0, -2.0, -2.0]]
    loss, metrics, grad = loss_of(CISPO(clip_high=4.0), [[7.0, 0.5, 1.0]] * 2, advantages, old=old)
    # -min(r, 5) A log pi, with log pi = old + log r, and the gradient -min(r, 5) A.
    logp = [-2 + log(7), -3 + log(0.5), -1.0]
    assert loss == close([-5 * logp[0], -0.5 * logp[1], -logp[2], 10 * logp[0], 1.0 * logp[1], 2 * logp[2]])
    assert grad == close([-5.0, -0.5, -1.0, 10.0, 1.0, 2.0])
    assert metrics["actor/clip_frac_high"].tolist() == [[1, 0, 0], [1, 0, 0]]


def test_sapo_gates_softly_with_a_temperature_for_each_sign():
    loss, metrics, grad = loss_of(SAPO(), [[2.0, 1.0, 0.5], [1.0, 2.0, 0.5]], [[1.0] * 3, [-1.0] * 3])

    def sigmoid(x):
        return 1 / (1 + exp(-x))

    positive = [-4 * sigmoid(1.0), -2.0, -4 * sigmoid(-0.5)]
    negative = [2 / 1.05, 4 / 1.05 * sigmoid(1.05), 4 / 1.05 * sigmoid(-0.525)]
    assert loss == close(positive + negative)
    # d/d log pi: -A r 4 p (1 - p), which is -A at r = 1 for every temperature.
    p = sigmoid(1.0)
    assert grad[:2] == close([-2 * 4 * p * (1 - p), -1.0])
    assert grad[3] == close(1.0)
    assert metrics["actor/gate"].flatten().tolist()[:2] == close([4 * p * (1 - p), 1.0])


def test_gmpo_clips_each_token_in_log_space_before_the_mean():
    ratio = [[exp(0.6), exp(-0.9), exp(0.2)], [1.0, exp(0.5), exp(-0.8)]]
    loss, metrics, grad = loss_of(GMPO(), ratio, [[1.0] * 3, [-2.0] * 3], mask=MASK)
    # A > 0: (0.4 - 0.9 + 0.2) / 3 = -0.1; A < 0: (0.5 - 0.4) / 2 = 0.05, its first column masked.
    assert loss[:3] == close([-exp(-0.1)] * 3)
    assert loss[4:] == close([2 * exp(0.05)] * 2)
    # Every token that is not clipped moves the mean: 3 tokens * -exp(-0.1) / 3.
    assert grad == close([0.0, -exp(-0.1), -exp(-0.1), 0.0, 2 * exp(0.05), 0.0])
    assert metrics["actor/clip_frac"].tolist() == [[1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("objective", [GSPO(clip_low=0.2, clip_high=0.2), GMPO()])
def test_a_sequences_ratio_has_the_gradient_of_the_whole_ratio_while_its_advantage_is_shared(objective):
    ratio, advantages = [[1.1, 0.9, 1.2], [1.0, 1.3, 0.9]], torch.tensor([[1.0] * 3, [-2.0] * 3])
    loss, _, grad = loss_of(objective, ratio, advantages.tolist(), mask=MASK)
    # exp(mean of log r) as the papers write it, by autograd: each token moves the whole sequence's ratio.
    now = (OLD + torch.tensor(ratio).log()).requires_grad_()
    log_s = torch.where(MASK, now - OLD, 0.0).sum(dim=1, keepdim=True) / MASK.sum(dim=1, keepdim=True)
    whole = torch.where(MASK, -log_s.exp() * advantages, 0.0)
    whole.sum().backward()
    kept = MASK.flatten().tolist()
    assert [x for x, keep in zip(loss, kept, strict=True) if keep] == close(whole[MASK].tolist())
    assert grad == close(now.grad.flatten().tolist())


@pytest.mark.parametrize("objective", [GSPO(clip_low=0.5, clip_high=0.5), GMPO()])
def test_what_differs_within_a_sequence_stays_with_its_token(objective):
    ratio, advantages = [[1.1, 0.9, 1.2]] * 2, [[1.0, 0.0, -3.0]] * 2
    _, _, grad = loss_of(objective, ratio, advantages)
    s = (1.1 * 0.9 * 1.2) ** (1 / 3)
    assert grad[:3] == close([-s, 0.0, 3 * s])


@pytest.mark.parametrize("objective", [each() for each in FAMILY if each not in (PPO, M2PO)], ids=repr)
def test_a_token_that_a_correction_rejects_has_no_gradient(objective):
    now = OLD.clone().requires_grad_()
    rollout = OLD - torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    policy = PolicyOutput(logprobs=now, entropy=torch.zeros_like(now))
    loss, _ = full_loss(objective, IcePop(), policy, batch_of(rollout=rollout), torch.ones(2, 3))
    torch.where(MASK, loss, 0.0).sum().backward()
    assert now.grad.flatten().tolist() == close([-1.0, 0.0, -1.0, 0.0, -1.0, -1.0])


def test_m2po_masks_what_drifted_furthest_and_weighs_the_rest_by_policy_over_rollout():
    old = torch.tensor([[-1.0, -1.5, -0.8], [0.0, -1.3, -1.0]])
    rollout = old - torch.tensor([[0.1, -0.5, 0.2], [0.0, -0.3, 0.0]])
    batch = batch_of(old=old, rollout=rollout, rewards=(3.0, 1.0))
    objective = M2PO(second_moment=0.04, divide_by_std=False)
    advantages = objective.advantages(batch)
    # Squares 0.01, 0.25, 0.04, 0.09, 0: without 0.25 their mean is 0.035.
    assert advantages.tolist() == [[1.0, 0.0, 1.0], [0.0, -1.0, -1.0]]
    policy = PolicyOutput(logprobs=old + 0.1, entropy=torch.zeros(2, 3))
    loss, metrics = objective.loss(policy, batch, advantages)
    assert loss[MASK].tolist() == close([-exp(0.2), 0.0, -exp(0.3), exp(-0.2), exp(0.1)])
    assert metrics["actor/second_moment"][MASK].tolist() == close([0.04, 0.16, 0.09, 0.04, 0.01])


def test_kl_in_the_reward_is_paid_token_by_token():
    mask = torch.tensor([[True, True, False]])
    old = torch.tensor([[-1.0, -2.0, 0.0]])
    ref = torch.tensor([[-1.2, -1.9, 9.0]])
    values = torch.tensor([[0.5, 0.6, 0.0]])
    batch = batch_of(mask, old, rewards=(1.0,), group_ids=(0,), ref=ref, values=values)
    paid, _ = prepare(PPO(kl_coef=0.5, kl_in="reward", kl_estimator="k1"), batch)
    # k1 is 0.2 and -0.1.
    assert paid.token_rewards.flatten().tolist() == close([-0.1, 1.05, 0.0])
    assert paid.rewards.tolist() == close([0.95])
    # The critic learns the same rewards: with lam = 1 the return of token 0 is their sum.
    policy = PolicyOutput(logprobs=old, entropy=torch.zeros(1, 3), values=values)
    _, metrics = PPO(lam=1.0).loss(policy, paid, torch.zeros(1, 3))
    assert metrics["critic/returns"][0, :2].tolist() == close([0.95, 1.05])


def test_kl_in_the_reward_reaches_an_objective_that_knows_sequences_only():
    ref = OLD - torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.4, 0.0]])
    objective = GRPO(kl_coef=1.0, kl_in="reward", kl_estimator="k1", divide_by_std=False)
    batch, advantages = prepare(objective, batch_of(ref=ref))
    # Rewards 1 - 0.6 and 0 - 0.4, mean 0.
    assert advantages[MASK].tolist() == close([0.4] * 3 + [-0.4] * 2)
    policy = PolicyOutput(logprobs=OLD, entropy=torch.zeros(2, 3))
    loss, metrics = full_loss(objective, Uncorrected(), policy, batch, advantages)
    assert loss[MASK].tolist() == close([-0.4] * 3 + [0.4] * 2), "and not in the loss as well"
    assert "actor/kl_loss" not in metrics
    assert metrics["actor/kl_reward"][MASK].tolist() == close([0.1, 0.2, 0.3, 0.4, 0.0])


def test_while_the_critic_warms_up_no_term_moves_the_policy():
    now, entropy = OLD.clone().requires_grad_(), torch.ones(2, 3, requires_grad=True)
    values = torch.zeros(2, 3, requires_grad=True)
    batch = batch_of(ref=OLD - 0.3, values=torch.zeros(2, 3))
    objective = PPO(kl_coef=0.1, entropy_coef=0.1, critic_warmup=5)
    policy = critic_alone(PolicyOutput(logprobs=now, entropy=entropy, values=values))
    loss, _ = full_loss(objective, Uncorrected(), policy, batch, objective.advantages(batch))
    loss.sum().backward()
    assert now.grad.abs().max() == 0
    assert entropy.grad.abs().max() == 0
    assert values.grad.abs().max() > 0


def test_advantages_of_another_shape_are_refused_with_the_name_of_the_objective():
    class Flat(GRPO):
        def advantages(self, batch):
            return batch.rewards

    with pytest.raises(ValueError, match=r"Flat\.advantages returned shape \(2,\).*rl\.objectives\.advantages\.spread"):
        prepare(Flat(), batch_of())


def test_what_an_objective_cannot_have_is_refused():
    for make in (CISPO, GMPO):
        with pytest.raises(ValueError, match="leave dual_clip=None"):
            make(dual_clip=3.0)


@pytest.mark.parametrize("make", FAMILY, ids=lambda m: m.__name__)
def test_every_docstring_names_its_paper(make):
    assert "arXiv" in make.__doc__
