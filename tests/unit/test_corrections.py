"""What each correction makes of ratios known by hand: r = old / rollout, over sampled tokens only."""

from dataclasses import replace
from math import exp, inf, log, nan

import pytest
import torch

from rl.objectives.corrections import MIS, GeometricMask, IcePop, SequenceTIS, TokenTIS, Uncorrected
from rl.objectives.ratios import sequence_log_ratio, token_log_ratio
from rl.types import Step

MASK = torch.tensor([[False, True, True, False], [True, True, True, True]])
EVERY = pytest.mark.parametrize(
    "correction",
    [Uncorrected(), TokenTIS(), SequenceTIS(), MIS(), IcePop(), GeometricMask()],
    ids=lambda c: type(c).__name__,
)


def batch_of(d, mask=MASK):
    """A batch in which old - rollout is d; the rollout's own numbers are 0, so that d is exact."""
    d = torch.tensor(d) if isinstance(d, list) else d
    return Step(
        input_ids=torch.zeros(d.shape[0], d.shape[1] + 1, dtype=torch.long),
        mask=mask,
        rollout_logprobs=torch.zeros_like(d),
        versions=torch.zeros(d.shape, dtype=torch.long),
        rewards=torch.zeros(len(d)),
        group_ids=torch.zeros(len(d), dtype=torch.long),
        old_logprobs=d,
    )


def row(correction, d):
    """Weights of one sequence, all of whose tokens were sampled."""
    batch = batch_of([d], torch.ones(1, len(d), dtype=torch.bool))
    return correction.weights(batch)[0].tolist()


# Ratios 1.5 and 4 in the first sequence (their product is 6), and 0.5, 1, 1.2, 0.75 in the second (0.45).
RATIOS = batch_of([[nan, log(1.5), log(4.0), nan], [log(0.5), 0.0, log(1.2), log(0.75)]])


@pytest.mark.parametrize(
    ("correction", "first", "second"),
    [
        (Uncorrected(), [0, 1, 1, 0], [1, 1, 1, 1]),
        (TokenTIS(cap=2.0), [0, 1.5, 2, 0], [0.5, 1, 1.2, 0.75]),
        (SequenceTIS(cap=5.0), [0, 5, 5, 0], [0.45] * 4),
        (MIS(low=0.4, high=5.0), [0, 0, 0, 0], [0.45] * 4),
        (MIS(low=0.5, high=6.5), [0, 6, 6, 0], [0] * 4),
        (IcePop(low=0.7, high=3.0), [0, 1.5, 0, 0], [0, 1, 1.2, 0.75]),
        # Geometric means sqrt(6) = 2.449 and 0.45^(1/4) = 0.819.
        (GeometricMask(low=0.8, high=2.4), [0, 0, 0, 0], [1] * 4),
        (GeometricMask(low=0.9, high=2.5), [0, 1, 1, 0], [0] * 4),
    ],
)
def test_weights_of_ratios_known_by_hand(correction, first, second):
    got = correction.weights(RATIOS).tolist()
    assert got[0] == pytest.approx(first)
    assert got[1] == pytest.approx(second)


def test_the_bounds_of_a_range_are_inside_it():
    low, high = float(torch.tensor(-0.25).exp()), float(torch.tensor(0.25).exp())
    exact, narrower = {"low": low, "high": high}, {"low": low + 1e-6, "high": high - 1e-6}
    assert row(IcePop(**exact), [-0.25, 0.25]) == [low, high]
    assert row(IcePop(**narrower), [-0.25, 0.25]) == [0, 0]
    for d, bound in ((-0.125, low), (0.125, high)):
        assert row(MIS(**exact), [d, d]) == [bound, bound]
        assert row(MIS(**narrower), [d, d]) == [0, 0]
    for d in (-0.25, 0.25):
        assert row(GeometricMask(**exact), [d, d]) == [1, 1]
        assert row(GeometricMask(**narrower), [d, d]) == [0, 0]


@EVERY
def test_masked_columns_never_matter_and_weigh_nothing(correction):
    sampled = torch.tensor([[0.1, 0.004, -0.002, 0.1], [0.3, -0.2, 0.1, 0.2]])
    weights = correction.weights(batch_of(sampled))
    for noise in (0.0, 7.0, -inf, inf, nan):
        assert torch.equal(correction.weights(batch_of(torch.where(MASK, sampled, noise))), weights)
    assert weights[~MASK].tolist() == [0, 0]
    assert weights[MASK].count_nonzero() > 0
    assert correction.weights(batch_of(sampled, torch.zeros_like(MASK))).count_nonzero() == 0


@EVERY
@pytest.mark.parametrize("d", [50.0, -50.0, 1e4, -1e4, inf, -inf])
def test_extreme_log_ratios_give_finite_weights(correction, d):
    extreme = batch_of([[0.0, d, d, 0.0], [d, -d, d, d]])
    assert correction.weights(extreme).isfinite().all()
    assert token_log_ratio(extreme)[0].tolist() == [0, *[20.0 if d > 0 else -20.0] * 2, 0]
    assert sequence_log_ratio(extreme).tolist() == [20.0 if d > 0 else -20.0] * 2
    assert sequence_log_ratio(extreme).exp().square().isfinite().all(), "the second moment, too"


@EVERY
def test_no_gradient_flows_through_a_weight(correction):
    old = torch.zeros(2, 4, requires_grad=True)
    weights = correction.weights(batch_of(old))
    assert not weights.requires_grad
    (weights * old).sum().backward()
    assert torch.equal(old.grad, weights)
    assert old.grad.sum() == 6  # ratios of 1 are in every range


@pytest.mark.parametrize("correction", [TokenTIS(), SequenceTIS(), MIS(), IcePop()], ids=lambda c: type(c).__name__)
def test_a_weight_that_is_not_a_number_is_not_hidden(correction):
    assert all(w != w for w in row(correction, [nan]))


def test_one_nan_rejects_a_sequence_of_the_geometric_mask():
    assert row(GeometricMask(), [0.0, nan]) == [0, 0]


def test_a_sequence_weight_is_the_product_and_a_geometric_mean_forgets_the_length():
    short, long = [0.02] * 2, [0.02] * 40
    assert row(SequenceTIS(cap=9.0), short)[0] == pytest.approx(exp(0.04))
    assert row(SequenceTIS(cap=9.0), long)[0] == pytest.approx(exp(0.8))
    assert row(GeometricMask(high=1.03), short)[0] == row(GeometricMask(high=1.03), long)[0] == 1


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (TokenTIS, {"cap": 0.5}),
        (SequenceTIS, {"cap": 0.0}),
        (MIS, {"low": 2.0, "high": 0.5}),
        (IcePop, {"low": -0.1}),
        (GeometricMask, {"low": 1.01, "high": 1.02}),
    ],
)
def test_a_range_that_cuts_where_both_sides_agree_is_refused(make, settings):
    with pytest.raises(ValueError, match="use 0 <= low <= 1 <= high"):
        make(**settings)


def test_the_rollout_s_side_is_the_denominator():
    batch = replace(batch_of([[0.0] * 4] * 2), rollout_logprobs=torch.full((2, 4), -log(1.5)))
    assert TokenTIS().weights(batch)[1].tolist() == pytest.approx([1.5] * 4)
