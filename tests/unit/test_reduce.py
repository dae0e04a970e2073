"""One loss whatever the split, and metrics that average as their shape says."""

import math

import pytest
import torch

from rl.batch import micro_batches, take
from rl.reduce import Meter, Totals, loss_weights, masked_mean
from rl.types import Batch

MASK = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])
TOTALS = Totals(tokens=3, sequences=3, horizon=8)


def test_averaging_over_tokens_counts_every_token_alike():
    assert loss_weights(MASK, "tokens", TOTALS).flatten().tolist() == pytest.approx(
        [1 / 3, 1 / 3, 0, 0, 1 / 3, 0, 0, 0, 0]
    )


def test_averaging_over_sequences_counts_every_sequence_alike():
    got = loss_weights(MASK, "sequences", TOTALS)
    assert got.flatten().tolist() == pytest.approx([1 / 6, 1 / 6, 0, 0, 1 / 3, 0, 0, 0, 0])


def test_averaging_over_a_constant_divides_by_sequences_and_horizon():
    assert loss_weights(MASK, "constant", TOTALS).flatten().tolist() == pytest.approx(
        [1 / 24, 1 / 24, 0, 0, 1 / 24, 0, 0, 0, 0]
    )


def step_of(rows, columns, seed):
    """A step whose `rollout_logprobs` stand for its per-token loss."""
    g = torch.Generator().manual_seed(seed)
    ends = torch.randint(2, columns + 1, (rows,), generator=g)
    column = torch.arange(columns)[None]
    return Batch(
        input_ids=torch.zeros(rows, columns + 1, dtype=torch.long),
        mask=(column < ends[:, None]) & (column >= 1),
        rollout_logprobs=torch.randn(rows, columns, generator=g, dtype=torch.float64),
        versions=torch.zeros(rows, columns, dtype=torch.long),
        rewards=torch.zeros(rows),
        group_ids=torch.arange(rows) // 4,
    )


@pytest.mark.slow
@pytest.mark.parametrize("average_over", ["tokens", "sequences", "constant"])
@pytest.mark.parametrize("share_prompts", [False, True])
def test_no_split_into_micro_batches_and_ranks_changes_the_loss(average_over, share_prompts):
    batch = step_of(rows=24, columns=12, seed=0)
    rows = torch.arange(24)
    totals = Totals(tokens=int(batch.mask.sum()), sequences=24, horizon=12)

    def loss(part):
        weights = loss_weights(part.mask, average_over, totals)
        return float(torch.where(part.mask, part.rollout_logprobs * weights, 0.0).sum())

    per_row = [batch.rollout_logprobs[r][batch.mask[r]] for r in range(24)]
    whole = {
        "tokens": float(torch.cat(per_row).mean()),
        "sequences": sum(float(x.mean()) for x in per_row) / 24,
        "constant": sum(float(x.sum()) for x in per_row) / 24 / 12,
    }[average_over]
    for ranks in (1, 2, 3, 5):
        for budget in (1, 13, 40, 10**6):
            cut = micro_batches(batch, rows, ranks=ranks, budget=budget, share_prompts=share_prompts)
            total = sum(loss(take(batch, micro)) for rank in cut for micro in rank)
            assert total == pytest.approx(whole, abs=1e-7)


def test_masked_mean_is_the_mean_of_sampled_tokens_and_0_without_any():
    x = torch.tensor([[1.0, 4.0, math.nan], [9.0, 2.0, 9.0], [9.0, 9.0, 9.0]])
    assert masked_mean(x, MASK).tolist() == [2.5, 2.0, 0.0]


def test_a_token_metric_is_averaged_over_tokens_and_a_sequence_metric_over_sequences():
    meter = Meter()
    meter.add(
        {
            "token": torch.tensor([[1.0, 2.0, 99.0], [99.0, 6.0, 99.0], [99.0, 99.0, 99.0]]),
            "sequence": torch.tensor([1.0, 5.0, 99.0]),  # the last row has no sampled token
        },
        MASK,
    )
    assert meter.means() == {"token": 3.0, "sequence": 3.0}


def test_micro_batches_of_unequal_size_weigh_by_their_tokens():
    meter = Meter()
    meter.add({"x": torch.tensor([[1.0, 1.0, 1.0]])}, torch.tensor([[True, True, True]]))
    meter.add({"x": torch.tensor([[5.0, 99.0, 99.0]])}, torch.tensor([[True, False, False]]))
    assert meter.means() == {"x": 2.0}


def test_a_name_that_ends_in_max_is_a_maximum_of_sampled_tokens():
    meter = Meter()
    for top in (-3.0, -1.0, -2.0):
        meter.add({"gap_max": torch.tensor([[top, -9.0, 99.0]])}, torch.tensor([[True, True, False]]))
    assert meter.means() == {"gap_max": -1.0}


def test_meters_merged_over_ranks_are_one_meter():
    g = torch.Generator().manual_seed(3)
    one, ranks = Meter(), [Meter(), Meter(), Meter()]
    for i in range(7):
        mask = torch.rand(3, 4, generator=g) < 0.5
        metrics = {
            "token": torch.randn(3, 4, generator=g),
            "sequence": torch.randn(3, generator=g),
            "worst_max": torch.randn(3, 4, generator=g),
        }
        one.add(metrics, mask)
        ranks[i % 2].add(metrics, mask)  # the third rank had nothing to do
    merged = Meter()
    for meter in ranks:
        merged.merge(meter)
    assert merged.means() == pytest.approx(one.means(), abs=1e-6)
    assert set(merged.means()) == {"token", "sequence", "worst_max"}


def test_a_metric_of_another_shape_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'mean_loss'.*\(\).*not a reduced number"):
        Meter().add({"mean_loss": torch.tensor(1.0)}, MASK)
    with pytest.raises(ValueError, match=r"'x'.*\(2, 3\)"):
        Meter().add({"x": torch.zeros(2, 3)}, MASK)


@pytest.mark.parametrize("values", [[math.nan, 1.0], [1.0, math.nan], [1.0, math.nan, 2.0]])
def test_a_nan_is_seen_in_a_maximum_and_in_a_mean(values):
    meter = Meter()
    for v in values:
        meter.add({"x_max": torch.tensor([v]), "x": torch.tensor([v])}, torch.tensor([[True]]))
    assert math.isnan(meter.means()["x_max"])
    assert math.isnan(meter.means()["x"])


def test_the_nan_of_another_rank_is_seen_too():
    healthy, broken = Meter(), Meter()
    healthy.add({"x_max": torch.tensor([1.0])}, torch.tensor([[True]]))
    broken.add({"x_max": torch.tensor([math.nan])}, torch.tensor([[True]]))
    for order in ([healthy, broken], [broken, healthy]):
        merged = Meter()
        for meter in order:
            merged.merge(meter)
        assert math.isnan(merged.means()["x_max"])
