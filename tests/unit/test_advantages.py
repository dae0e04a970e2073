"""Advantages against their formulas, number by number."""

from math import sqrt

import pytest
import torch

from rl.objectives.advantages import (
    at_end,
    gae,
    group_relative,
    kept_by_second_moment,
    leave_one_out,
    length_weighted,
    spread,
    whiten,
)


def test_an_advantage_is_reward_minus_group_mean():
    # Group 7 holds rewards 1, 2, 6 (mean 3), group 3 holds 0, 4 (mean 2), and their rows are interleaved.
    rewards = torch.tensor([1.0, 0.0, 2.0, 4.0, 6.0])
    group_ids = torch.tensor([7, 3, 7, 3, 7])
    got = group_relative(rewards, group_ids, divide_by_std=False)
    assert got.tolist() == [-2.0, -2.0, -1.0, 2.0, 3.0]


def test_the_standard_deviation_is_unbiased_and_that_of_the_own_group():
    rewards = torch.tensor([1.0, 0.0, 2.0, 4.0, 6.0])
    group_ids = torch.tensor([7, 3, 7, 3, 7])
    got = group_relative(rewards, group_ids, divide_by_std=True, eps=1e-4)
    std_7 = sqrt((4 + 1 + 9) / 2) + 1e-4
    std_3 = sqrt((4 + 4) / 1) + 1e-4
    assert got.tolist() == pytest.approx([-2 / std_7, -2 / std_3, -1 / std_7, 2 / std_3, 3 / std_7], rel=1e-6)


def test_a_group_of_equal_rewards_has_no_advantage():
    got = group_relative(torch.tensor([0.5, 0.5, 1.0]), torch.tensor([0, 0, 1]), divide_by_std=True)
    assert got.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("reward", [0.7, -0.1, 10.1, 1000.1])
def test_equal_rewards_that_fp32_cannot_average_have_none_either(reward):
    rewards, group_ids = torch.full((24,), reward), torch.arange(24) // 8
    mask = torch.arange(5)[None] < torch.randint(1, 6, (24, 1), generator=torch.Generator().manual_seed(0))
    assert not group_relative(rewards, group_ids, divide_by_std=True).any()
    assert not leave_one_out(rewards, group_ids).any()
    assert not length_weighted(rewards, group_ids, mask).any()


def test_group_names_do_not_matter():
    rewards = torch.tensor([1.0, 0.0, 3.0, 1.0])
    small = group_relative(rewards, torch.tensor([0, 1, 0, 1]), divide_by_std=True)
    large = group_relative(rewards, torch.tensor([10**9, 4, 10**9, 4]), divide_by_std=True)
    assert torch.equal(small, large)
    assert small.abs().min() > 0


def test_spread_gives_sampled_tokens_their_sequences_number():
    mask = torch.tensor([[False, True, True], [True, False, True]])
    assert spread(torch.tensor([2.0, -1.0]), mask).tolist() == [[0.0, 2.0, 2.0], [-1.0, 0.0, -1.0]]


def test_gae_of_one_sequence_by_hand():
    # delta_1 = 1 - 0.6, delta_0 = 0.5 * 0.6 - 0.2; A_1 = delta_1, A_0 = delta_0 + 0.5 * 0.8 * delta_1.
    got = gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.2, 0.6]]), torch.tensor([[True, True]]), gamma=0.5, lam=0.8)
    assert got[0].tolist() == pytest.approx([0.1 + 0.4 * 0.4, 0.4])


def test_gae_is_the_double_sum_over_sampled_tokens_alone():
    # Rows: one turn, two turns with a tool reply between, a gap at both ends, one single sampled token.
    mask = torch.tensor(
        [
            [True, True, True, True, True, True],
            [False, True, True, False, False, True],
            [False, False, True, False, True, False],
            [False, False, False, True, False, False],
        ]
    )
    values = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    rewards = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    gamma, lam = 0.9, 0.7
    got = gae(rewards, values, mask, gamma=gamma, lam=lam)

    want = torch.zeros(mask.shape)
    for row in range(len(mask)):
        steps = mask[row].nonzero()[:, 0].tolist()
        v = [float(values[row, t]) for t in steps] + [0.0]
        r = [float(rewards[row, t]) for t in steps]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(steps))]
        for i, t in enumerate(steps):
            want[row, t] = sum((gamma * lam) ** k * delta[i + k] for k in range(len(steps) - i))
    assert torch.allclose(got, want, atol=1e-6)


def test_gae_with_lambda_and_gamma_of_one_is_reward_minus_value():
    mask = torch.tensor([[False, True, False, True]])
    values = torch.tensor([[9.0, 0.25, 9.0, 0.75]])
    got = gae(at_end(torch.tensor([2.0]), mask), values, mask, gamma=1.0, lam=1.0)
    assert got[0].tolist() == [0.0, 1.75, 0.0, 1.25]


def test_values_outside_the_mask_do_not_reach_gae():
    mask = torch.tensor([[False, True, False, True, False]])
    values = torch.tensor([[0.0, 0.3, 0.0, 0.6, 0.0]])
    junk = torch.where(mask, values, 1e6)
    paid = at_end(torch.tensor([1.0]), mask)
    quiet, loud = (gae(r, v, mask, gamma=0.9, lam=0.9) for r, v in ((paid, values), (paid + 7.0 * ~mask, junk)))
    assert torch.equal(quiet, loud)


def test_whitened_tokens_have_mean_0_and_variance_1_over_the_step():
    mask = torch.tensor([[True, True, False], [True, False, True]])
    x = torch.tensor([[1.0, 2.0, 99.0], [3.0, 99.0, 6.0]])
    # Sampled: 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4.
    scale = sqrt(14 / 4)
    got = whiten(x, mask)
    assert got.flatten().tolist() == pytest.approx([-2 / scale, -1 / scale, 0, 0, 0, 3 / scale], abs=1e-6)


def test_whitening_equal_numbers_gives_zeros_and_no_nan():
    mask = torch.tensor([[True, True, False]])
    assert whiten(torch.tensor([[2.0, 2.0, 5.0]]), mask).tolist() == [[0.0, 0.0, 0.0]]


def test_a_sequences_reward_is_paid_at_its_last_sampled_token():
    mask = torch.tensor([[True, True, False], [False, True, True], [False, False, False]])
    assert at_end(torch.tensor([2.0, -1.0, 5.0]), mask).tolist() == [[0.0, 2.0, 0.0], [0.0, 0.0, -1.0], [0.0] * 3]


def test_leave_one_out_compares_with_the_mean_of_the_others():
    # Group 7: 1, 2, 6; group 3: 0, 4; group 9: alone.
    rewards, group_ids = torch.tensor([1.0, 0.0, 2.0, 4.0, 6.0, 5.0]), torch.tensor([7, 3, 7, 3, 7, 9])
    want = [1 - (2 + 6) / 2, 0 - 4, 2 - (1 + 6) / 2, 4 - 0, 6 - (1 + 2) / 2, 0.0]
    assert leave_one_out(rewards, group_ids).tolist() == pytest.approx(want)


def test_the_optimal_baseline_weighs_rewards_by_length():
    # Lengths 1, 3 with rewards 2, 6: baseline (2 + 18) / 4 = 5. The third row is another group, of length 2.
    mask = torch.tensor([[True, False, False], [True, True, True], [False, True, True]])
    got = length_weighted(torch.tensor([2.0, 6.0, 1.0]), torch.tensor([0, 0, 1]), mask)
    assert got.tolist() == pytest.approx([-3.0, 1.0, 0.0])


def test_the_tokens_that_are_furthest_off_leave_until_the_second_moment_of_the_rest_fits():
    log_ratio = torch.tensor([[0.1, -0.5, 0.2], [9.0, -0.3, 0.0]])
    mask = torch.tensor([[True, True, True], [False, True, True]])
    # Squares 0, 0.01, 0.04, 0.09, 0.25; running means 0, 0.005, 0.0167, 0.035, 0.078.
    kept = {limit: kept_by_second_moment(log_ratio, mask, limit) for limit in (0.04, 0.03, 1.0)}
    assert kept[0.04].tolist() == [[True, False, True], [False, True, True]]
    assert kept[0.03].tolist() == [[True, False, True], [False, False, True]]
    assert torch.equal(kept[1.0], mask)


def test_tokens_that_are_equally_far_off_leave_together():
    kept = kept_by_second_moment(torch.tensor([[0.0, 0.3, -0.3]]), torch.ones(1, 3, dtype=torch.bool), 0.05)
    assert kept.tolist() == [[True, False, False]]
