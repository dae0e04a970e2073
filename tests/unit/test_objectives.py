"""GRPO, GSPO and PPO against numbers derived by hand and against the papers' equations."""

from dataclasses import replace
from math import exp, log
from statistics import fmean, stdev

import pytest
import torch

from rl.objectives import GRPO, GSPO, PPO, Objective, clipped_surrogate
from rl.reduce import Totals, loss_weights
from rl.types import PolicyOutput, Step

MASK = torch.tensor([[True, True, True], [False, True, True]])


def batch_of(mask, old, rewards=None, group_ids=None, values=None):
    b = len(mask)
    return Step(
        input_ids=torch.zeros(b, mask.shape[1] + 1, dtype=torch.long),
        mask=mask,
        rollout_logprobs=old,
        versions=torch.zeros(mask.shape, dtype=torch.long),
        rewards=torch.zeros(b) if rewards is None else rewards,
        group_ids=torch.zeros(b, dtype=torch.long) if group_ids is None else group_ids,
        old_logprobs=old,
        values=values,
    )


def says(logprobs, values=None):
    return PolicyOutput(logprobs=logprobs, entropy=torch.zeros_like(logprobs), values=values)


def test_grpo_takes_the_lower_of_the_free_and_the_clipped_ratio():
    ratio = torch.tensor([[1.5, 0.5, 1.1], [1.5, 0.5, 1.1]])
    advantages = torch.tensor([[1.0, 1.0, 1.0], [-2.0, -2.0, -2.0]])
    old = torch.full((2, 3), -1.0)
    batch = batch_of(torch.ones(2, 3, dtype=torch.bool), old)
    loss, metrics = GRPO(clip_low=0.2, clip_high=0.3).loss(says(old + ratio.log()), batch, advantages)
    # A > 0: min(r, 1.3) A; A < 0: min(r A, max(r, 0.8) A).
    assert loss.flatten().tolist() == pytest.approx([-1.3, -0.5, -1.1, 3.0, 1.6, 2.2])
    assert metrics["actor/clip_frac_high"].tolist() == [[1, 0, 0], [0, 0, 0]]
    assert metrics["actor/clip_frac_low"].tolist() == [[0, 0, 0], [0, 1, 0]]
    assert metrics["actor/clip_frac"].tolist() == [[1, 0, 0], [0, 1, 0]]


def test_a_clipped_token_has_no_gradient_and_a_free_one_has_ratio_times_advantage():
    log_ratio = torch.tensor([[log(1.5), log(1.1), log(0.5)], [log(0.5), log(0.9), log(1.5)]], requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])
    clipped_surrogate(log_ratio, advantages, 0.2, 0.2)[0].sum().backward()
    assert log_ratio.grad.flatten().tolist() == pytest.approx([0.0, -1.1, -0.5, 0.0, 0.9, 1.5])


def test_the_advantage_of_grpo_is_spread_over_the_sampled_tokens():
    batch = batch_of(MASK, torch.zeros(2, 3), rewards=torch.tensor([3.0, 1.0]))
    got = GRPO(divide_by_std=False).advantages(batch)
    assert got.tolist() == [[1.0, 1.0, 1.0], [0.0, -1.0, -1.0]]


def test_gspo_uses_one_ratio_for_a_sequence_the_geometric_mean():
    old = torch.tensor([[-1.0, -2.0, -3.0], [0.0, -1.0, -1.0]])
    now = torch.tensor([[-0.8, -1.6, -3.0], [0.0, -1.3, -0.9]])
    # Mean log-ratios: (0.2 + 0.4 + 0) / 3 = 0.2 and (-0.3 + 0.1) / 2 = -0.1.
    advantages = torch.tensor([[1.0, 1.0, 1.0], [0.0, -1.0, -1.0]])
    loss, metrics = GSPO(clip_low=0.3, clip_high=0.1).loss(says(now), batch_of(MASK, old), advantages)
    assert loss.flatten().tolist() == pytest.approx([-1.1, -1.1, -1.1, 0.0, exp(-0.1), exp(-0.1)])
    assert metrics["actor/clip_frac_high"].tolist() == [[1, 1, 1], [0, 0, 0]]


def test_gspo_is_the_papers_equation_sequence_by_sequence():
    # arXiv 2507.18071: eq. 5 (objective), 6 (advantage), 7 (ratio), over one group of four with its own lengths.
    g = torch.Generator().manual_seed(1)
    lengths, rewards = [5, 2, 4, 1], [1.0, 0.0, 0.5, 1.0]
    mask = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    old = -torch.rand(4, 5, generator=g, dtype=torch.float64) * mask
    now = ((old + 0.2 * torch.randn(4, 5, generator=g, dtype=torch.float64)) * mask).requires_grad_()
    batch = batch_of(mask, old, rewards=torch.tensor(rewards))
    objective = GSPO(clip_low=0.05, clip_high=0.08)
    loss, _ = objective.loss(says(now), batch, objective.advantages(batch))
    weights = loss_weights(mask, objective.average_over, Totals(tokens=12, sequences=4, horizon=5))
    total = (loss * weights).sum()
    total.backward()

    log_ratio, terms, gradient = (now - old).detach(), [], torch.zeros(4, 5)
    for i, length in enumerate(lengths):
        a = (rewards[i] - fmean(rewards)) / (stdev(rewards) + 1e-4)
        s = exp(sum(float(log_ratio[i, t]) for t in range(length)) / length)
        terms.append(min(s * a, min(max(s, 0.95), 1.08) * a))
        if terms[-1] == s * a:  # not clipped: eq. 10
            gradient[i, :length] = -a * s / length / 4
    assert total.item() == pytest.approx(-fmean(terms), abs=1e-6)
    assert torch.allclose(now.grad.float(), gradient, atol=1e-6)
    assert 0 < int((gradient != 0).any(dim=1).sum()) < 4, "the example must hold clipped and free sequences"


def test_ppo_adds_half_the_larger_of_two_squared_value_errors():
    mask = torch.tensor([[True, True]])
    old_values = torch.tensor([[0.5, 0.6]])
    batch = batch_of(mask, torch.zeros(1, 2), rewards=torch.tensor([1.0]), values=old_values)
    objective = PPO(gamma=1.0, lam=1.0, value_coef=0.5, value_clip=0.2)
    loss, metrics = objective.loss(
        says(torch.zeros(1, 2), torch.tensor([[0.9, 0.5]])), batch, torch.tensor([[1.0, -1.0]])
    )
    # Returns are 1. Column 0 moved by 0.4, clipped to 0.7: max(0.1^2, 0.3^2). Column 1 moved by -0.1: 0.5^2.
    assert metrics["critic/vf_loss"].flatten().tolist() == pytest.approx([0.045, 0.125])
    assert metrics["critic/vf_clipfrac"].tolist() == [[1.0, 0.0]]
    assert loss.flatten().tolist() == pytest.approx([-1 + 0.0225, 1 + 0.0625])


def test_a_value_within_its_range_is_not_clipped_by_rounding():
    old = torch.linspace(-0.1, 0.1, 400)[None]
    new = torch.linspace(-0.09, 0.09, 400).flip(0)[None]
    assert (old + (new - old) != new).any()
    batch = batch_of(torch.ones(1, 400, dtype=torch.bool), torch.zeros(1, 400), torch.tensor([1.0]), values=old)
    _, metrics = PPO().loss(says(torch.zeros(1, 400), new), batch, torch.ones(1, 400))
    assert metrics["critic/vf_clipfrac"].sum() == 0


def test_a_clipped_value_has_no_gradient():
    mask = torch.tensor([[True, True]])
    batch = batch_of(mask, torch.zeros(1, 2), rewards=torch.tensor([1.0]), values=torch.tensor([[0.5, 0.6]]))
    values = torch.tensor([[0.9, 0.5]], requires_grad=True)
    objective = PPO(gamma=1.0, lam=1.0, value_coef=0.5, value_clip=0.2)
    objective.loss(says(torch.zeros(1, 2), values), batch, torch.zeros(1, 2))[0].sum().backward()
    assert values.grad.flatten().tolist() == pytest.approx([0.0, 0.5 * (0.5 - 1.0)])


def test_the_advantage_of_ppo_is_whitened_gae():
    batch = batch_of(
        torch.tensor([[True, True]]), torch.zeros(1, 2), rewards=torch.tensor([1.0]), values=torch.tensor([[0.5, 0.6]])
    )
    # With gamma = lam = 1 the raw advantages are 0.5 and 0.4.
    assert PPO(lam=1.0).advantages(batch).flatten().tolist() == pytest.approx([1.0, -1.0], abs=1e-4)


@pytest.mark.parametrize("objective", [GRPO(), GSPO(), PPO()], ids=["GRPO", "GSPO", "PPO"])
def test_zero_advantage_gives_zero_policy_gradient(objective: Objective):
    now = torch.tensor([[-0.1, -2.0, -1.0], [0.0, -3.0, -0.5]], requires_grad=True)
    batch = batch_of(MASK, torch.full((2, 3), -1.0), values=torch.ones(2, 3))
    objective.loss(says(now, torch.zeros(2, 3)), batch, torch.zeros(2, 3))[0].sum().backward()
    assert now.grad.abs().max() == 0
    # The same policy learns as soon as there is an advantage, so the zero above is not an accident.
    now.grad = None
    advantages = torch.tensor([[-1.0, -1.0, -1.0], [0.0, 1.0, 1.0]])
    wide = replace(objective, clip_low=9.0, clip_high=9.0)
    wide.loss(says(now, torch.zeros(2, 3)), batch, advantages)[0].sum().backward()
    assert (now.grad[MASK] != 0).all()


@pytest.mark.parametrize("objective", [GRPO(), GSPO(), PPO()], ids=["GRPO", "GSPO", "PPO"])
def test_what_stands_outside_the_mask_never_matters(objective: Objective):
    mask = torch.tensor([[True, False, True, False], [False, True, True, False]])
    g = torch.Generator().manual_seed(2)
    clean = torch.randn(3, 2, 4, generator=g) * 0.1
    junk = torch.where(mask, clean, 3.0 + torch.rand(3, 2, 4, generator=g))

    def run(now, old, values):
        now, new_values = now.clone().requires_grad_(), (values + 0.1).requires_grad_()
        batch = batch_of(mask, old, rewards=torch.tensor([1.0, 0.0]), values=values)
        advantages = objective.advantages(batch) * mask
        loss = objective.loss(says(now, new_values), batch, advantages)[0]
        torch.where(mask, loss, 0.0).sum().backward()
        return loss[mask], now.grad, new_values.grad

    for quiet, loud in zip(run(*clean), run(*junk), strict=True):
        if quiet is None:
            assert loud is None  # an objective without a critic
        else:
            assert torch.equal(quiet, loud)
