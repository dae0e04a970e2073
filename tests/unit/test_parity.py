"""Statistics of the gap between two sides: each against the formula, by hand."""

import math
from dataclasses import replace

import pytest
import torch

from rl.objectives import GRPO, GSPO, PPO, Objective
from rl.parity.gap import clipped_by_noise, clustered_error, gap
from rl.types import Batch, Metrics, PolicyOutput

MASK = torch.tensor([[True, True, False], [False, True, True]])
D = torch.tensor([[0.1, -0.3, 9.0], [9.0, 0.0, math.log(3.0)]])


def batch_of(rollout: torch.Tensor, mask: torch.Tensor) -> Batch:
    rows, columns = mask.shape
    return Batch(
        input_ids=torch.zeros(rows, columns + 1, dtype=torch.long),
        mask=mask,
        rollout_logprobs=rollout,
        versions=torch.zeros(rows, columns, dtype=torch.long),
        rewards=torch.zeros(rows),
        group_ids=torch.zeros(rows, dtype=torch.long),
    )


def test_every_number_of_a_gap_is_its_formula_over_the_masked_tokens() -> None:
    rollout = torch.full((2, 3), -1.0)
    g = gap(rollout + D, rollout, MASK)
    d = [0.1, -0.3, 0.0, math.log(3.0)]
    assert (g.tokens, g.sequences) == (4, 2)
    assert g.mean_abs == pytest.approx(sum(map(abs, d)) / 4, rel=1e-6)
    assert g.max_abs == pytest.approx(math.log(3.0), rel=1e-6)
    assert g.k1 == pytest.approx(-sum(d) / 4, rel=1e-6)
    assert g.k3 == pytest.approx(sum(math.exp(x) - x - 1 for x in d) / 4, rel=1e-5)
    assert g.chi2 == pytest.approx(sum(math.exp(2 * x) for x in d) / 4 - 1, rel=1e-6)
    assert g.mult == pytest.approx(sum(math.exp(abs(x)) for x in d) / 4, rel=1e-6)
    assert g.outside == 0.25  # 3 is above 2; e^-0.3 is not below 0.5
    r = [math.exp(x) for x in d]
    assert g.ess_token == pytest.approx((sum(r) / 4) ** 2 / (sum(x * x for x in r) / 4), rel=1e-6)
    s = [math.exp(0.1 - 0.3), 3.0]
    assert g.ess_sequence == pytest.approx((sum(s) / 2) ** 2 / (sum(x * x for x in s) / 2), rel=1e-6)
    assert g.worst == (1, 2)


def test_a_standard_error_counts_sequences_and_not_their_tokens() -> None:
    # Ten copies of one token say no more than the token: two sequences, means 1 and 3, so 2 +- 1 however long.
    for length in (1, 10):
        x = torch.tensor([[1.0] * length, [3.0] * length])
        assert clustered_error(x, torch.ones(2, length, dtype=torch.bool)) == pytest.approx(1.0)
    assert math.isnan(clustered_error(x[:1], torch.ones(1, 10, dtype=torch.bool)))


def test_k3_keeps_its_digits_where_both_sides_agree() -> None:
    rollout = torch.full((2, 3), -3.0, dtype=torch.float64)
    g = gap(rollout + 1e-6, rollout, MASK)
    assert g.k3 == pytest.approx(5e-13, rel=1e-2)


def test_a_gap_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no sampled token"):
        gap(D, D, torch.zeros_like(MASK))


def test_noise_clips_gspo_long_before_grpo() -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    rollout = torch.full((2, 2), -1.0)
    # Sequence 0 is 0.001 up on average (above GSPO's 4e-4), sequence 1 is 0.0002 down (inside its 3e-4).
    trainer = rollout + torch.tensor([[0.002, 0.0], [-0.0004, 0.0]])
    clip = clipped_by_noise(GSPO(), batch_of(rollout, mask), trainer)
    assert clip is not None
    # It binds for a positive advantage only, which is half of the cases.
    assert clip.sequences == pytest.approx(0.25)
    assert clip.tokens == pytest.approx(0.25)
    for objective in (GRPO(), PPO()):
        free = clipped_by_noise(objective, batch_of(rollout, mask), trainer)
        assert free is not None
        assert (free.tokens, free.sequences) == (0.0, 0.0)


def test_the_noise_of_an_objective_that_reads_the_reference_can_be_told() -> None:
    class Near(GRPO):
        uses_reference = True

        def loss(self, policy: PolicyOutput, batch: Batch, advantages: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
            loss, metrics = super().loss(policy, batch, advantages)
            return loss + (policy.logprobs - batch.ref_logprobs) ** 2, metrics

    rollout = torch.full((2, 2), -1.0)
    clip = clipped_by_noise(Near(), batch_of(rollout, torch.ones(2, 2, dtype=torch.bool)), rollout)
    assert clip is not None
    assert clip.tokens == 0.0


def test_an_objective_without_clip_range_has_no_noise_to_clip() -> None:
    class Plain(Objective):
        def advantages(self, batch: Batch) -> torch.Tensor:
            return batch.rewards[:, None].expand_as(batch.mask)

        def loss(self, policy: PolicyOutput, batch: Batch, advantages: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
            return -advantages * policy.logprobs, {}

    rollout = torch.full((2, 3), -1.0)
    assert clipped_by_noise(Plain(), replace(batch_of(rollout, MASK)), rollout) is None
