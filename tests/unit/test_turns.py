"""Credit by turn: discounts, and turns that are compared with others of the same state, against an enumeration."""

import random
from math import sqrt

import pytest
import torch

from rl.objectives import GRPO, GiGPO, ReinforcePP
from rl.objectives.advantages import gae
from rl.objectives.turns import turn_relative, turn_returns
from rl.types import Batch

MASK = torch.tensor([[True, True, False, True, False, True], [True, False, True, True, False, False]])
TURNS = torch.tensor([[0, 0, -1, 1, -1, 2], [0, -1, 1, 1, -1, -1]])


def batch_of(mask, turns, states, paid, groups):
    shape = mask.shape
    return Batch(
        input_ids=torch.zeros(shape[0], shape[1] + 1, dtype=torch.long),
        mask=mask,
        rollout_logprobs=torch.zeros(shape),
        versions=torch.zeros(shape, dtype=torch.long),
        rewards=paid.sum(dim=1),
        group_ids=torch.tensor(groups),
        turns=turns,
        states=states,
        token_rewards=paid,
    )


def test_the_rewards_to_come_of_a_turn_are_discounted_by_turn():
    paid = torch.tensor([[0.0, 1.0, 9.0, 2.0, 0.0, 4.0], [3.0, 0.0, 1.0, 1.0, 0.0, 0.0]])
    got, there = turn_returns(paid, TURNS, MASK, gamma=0.5)
    # 1 + 0.5 (2 + 0.5 * 4) and 2 + 0.5 * 4 and 4; 3 + 0.5 * 2 and 2. The 9 was paid where nothing was sampled.
    assert got.tolist() == [[3.0, 4.0, 4.0], [4.0, 2.0, 0.0]]
    assert there.tolist() == [[True, True, True], [True, True, False]]


def test_the_discount_by_turn_is_paid_between_turns_alone():
    paid = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 8.0], [0.0, 0.0, 0.0, 8.0, 0.0, 0.0]])
    nothing = torch.zeros(MASK.shape)
    got = gae(paid, nothing, MASK, gamma=1.0, lam=1.0, turns=TURNS, turn_gamma=0.5)
    assert got.tolist() == [[2, 2, 0, 4, 0, 8], [4, 0, 8, 8, 0, 0]]
    # A value after the turn is discounted too: delta = 0.5 V' - V where a turn ends.
    values = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0, 1.0]])
    got = gae(nothing[:1], values, MASK[:1], gamma=1.0, lam=0.0, turns=TURNS[:1], turn_gamma=0.5)
    assert got.tolist() == [[0, -0.5, 0, -0.5, 0, -1]]


def test_reinforce_pp_discounts_by_turn():
    paid = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 8.0], [0.0, 0.0, 0.0, 8.0, 0.0, 0.0]])
    batch = batch_of(MASK, TURNS, None, paid, [0, 0])
    to_come = torch.tensor([2.0, 2, 4, 8, 4, 8, 8])
    want = (to_come - to_come.mean()) / to_come.std(unbiased=False)
    assert ReinforcePP(turn_gamma=0.5).advantages(batch)[MASK].tolist() == pytest.approx(want.tolist())


def enumerated(batch, gamma, weight, divide_by_std):
    """GiGPO token by token, as the paper writes it, with lists."""

    def relative(x, others):
        mean = sum(others) / len(others)
        if not divide_by_std:
            return x - mean
        std = sqrt(sum((o - mean) ** 2 for o in others) / max(len(others) - 1, 1))
        return (x - mean) / (std + 1e-4)

    steps = []  # (row, turn, group, state, reward to come)
    for b in range(len(batch.mask)):
        tokens = [t for t in range(batch.mask.shape[1]) if batch.mask[b, t]]
        for k in sorted({int(batch.turns[b, t]) for t in tokens}):
            to_come = sum(
                gamma ** (int(batch.turns[b, t]) - k) * float(batch.token_rewards[b, t])
                for t in tokens
                if batch.turns[b, t] >= k
            )
            (state,) = {int(batch.states[b, t]) for t in tokens if batch.turns[b, t] == k}
            steps.append((b, k, int(batch.group_ids[b]), state, to_come))
    out = torch.zeros(batch.mask.shape)
    rewards, groups = batch.rewards.tolist(), batch.group_ids.tolist()
    for b, k, group, state, to_come in steps:
        same = [x for _, _, g, s, x in steps if (g, s) == (group, state)]
        episode = relative(rewards[b], [r for r, g in zip(rewards, groups, strict=True) if g == group])
        out[b, batch.turns[b] == k] = episode + weight * relative(to_come, same)
    return out


@pytest.mark.parametrize("divide_by_std", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_gigpo_equals_an_enumeration_of_its_states(seed, divide_by_std):
    rng = random.Random(seed)
    rows, width = 9, 14
    mask, turns, states = (torch.full((rows, width), x) for x in (False, -1, -1))
    paid = torch.zeros(rows, width)
    for b in range(rows):
        t = rng.randint(0, 2)
        for k in range(rng.randint(1, 4)):
            state = 2**61 + rng.randint(0, 2)
            for _ in range(rng.randint(1, 2)):
                mask[b, t], turns[b, t], states[b, t] = True, k, state
                t += 1
            paid[b, t - 1] = rng.choice([0.0, 0.5, 1.0])
            t += rng.randint(0, 1)
    batch = batch_of(mask, turns, states, paid, [3, 1, 3, 1, 3, 1, 8, 8, 8])
    got = GiGPO(turn_gamma=0.8, turn_weight=0.6, divide_by_std=divide_by_std).advantages(batch)
    want = enumerated(batch, 0.8, 0.6, divide_by_std)
    assert torch.allclose(got, want, atol=1e-5)
    assert (want - enumerated(batch, 0.8, 0.0, divide_by_std)).abs().max() > 0.1, "turns have no part in this"


def test_a_turn_whose_state_no_other_had_has_the_episode_s_credit_alone():
    states = torch.where(MASK, 10 * torch.arange(2)[:, None] + TURNS, -1)
    paid = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0, 4.0], [3.0, 0.0, 1.0, 1.0, 0.0, 0.0]])
    batch = batch_of(MASK, TURNS, states, paid, [0, 0])
    assert torch.equal(GiGPO().advantages(batch), GRPO().advantages(batch))
    assert torch.equal(GiGPO(turn_weight=0.0).advantages(batch), GRPO().advantages(batch))


@pytest.mark.parametrize("reward", [0.7, 0.1, 100.1])
def test_equal_rewards_to_come_give_exactly_0(reward):
    mask = torch.ones(7, 2, dtype=torch.bool)
    turns, paid = torch.tensor([[0, 1]]).expand(7, 2), torch.tensor([[0.0, reward]]).expand(7, 2)
    batch = batch_of(mask, turns, torch.zeros(7, 2, dtype=torch.long) + turns, paid, [0] * 7)
    assert not turn_relative(batch, gamma=0.95, divide_by_std=True).any()


def test_without_turns_gigpo_counts_a_reply_as_a_turn_from_the_prompt():
    mask = torch.tensor([[True, True], [True, False], [True, True], [False, False]])
    paid = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    batch = batch_of(mask, None, None, paid, [0, 0, 1, 1])
    got = GiGPO(divide_by_std=False, turn_weight=1.0).advantages(batch)
    # Group 0: +-1/2 twice. In group 1 the other reply was not trained on: it has no turn, and its reward counts once.
    assert got.tolist() == [[1, 1], [-1, 0], [0.5, 0.5], [0, 0]]


def test_a_discount_that_is_none_is_refused():
    for wrong in ({"turn_gamma": 1.5}, {"turn_gamma": -0.1}, {"turn_weight": -1.0}):
        with pytest.raises(ValueError, match=r"must be from 0 to 1, and turn_weight=.* at least 0"):
            GiGPO(**wrong)
