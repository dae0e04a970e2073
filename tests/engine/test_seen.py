"""A real learner gives back what its passes computed: the same step to the last bit, and its metrics again."""

from dataclasses import replace

import pytest
import torch

from live import engine_config
from pair import make_learner
from planted_run import row
from rl.batch import collate
from rl.config import TrackingConfig, TrainerConfig
from rl.episodes.seen import Why
from rl.objectives import GRPO
from trainer.record.table import Told, table_of

ROWS = [
    replace(t, token_ids=[i % 60 for i in t.token_ids], versions=[0 if m else -1 for m in t.mask])
    for t in (
        row(sampled=4, reward=1.0),
        # One episode in two rows, in the order of its turns.
        row(episode=1, sampled=3, turns=[-1, -1, 0, 0, 0]),
        row(episode=1, prompt=6, sampled=2, turns=[-1] * 6 + [1, 1], row=1),
        row(group=1, sampled=5, reward=1.0),
        row(group=1, episode=1, sampled=2, reward=1.0),
    )
]


@pytest.mark.parametrize("source", ["recompute", "rollout"])
def test_the_record_changes_no_bit_of_a_step_and_gives_its_metrics_again(tiny, source):
    batch = collate(ROWS)
    found, table = [], {}
    for rollouts in ("off", "all"):
        config = engine_config(
            tiny(),
            objective=GRPO(),
            trainer=TrainerConfig(lr=1e-3, micro_batch_tokens=24),
            old_logprobs=source,
            tracking=TrackingConfig(rollouts=rollouts),
        )
        learner = make_learner(config)
        expected = learner.logprobs(batch)
        metrics = learner.step(batch)
        seen, spans = learner.told()
        found.append({name: x for name, x in metrics.items() if not name.startswith(("memory/", "perf/"))})
        assert {"gradients", "optimizer"} <= {name for name, *_ in spans}
        assert (seen is None) == (rollouts == "off")
        if seen:
            mask = batch.mask[seen.rows]
            assert torch.equal(seen.numbers["now"][mask], expected[seen.rows][mask])
            table = table_of(1, [Told(trajectory=t) for t in ROWS], [seen]).to_pydict()
    assert found[0] == found[1]
    metrics, passed = found[0], sum(table["passed"])

    def mean(name: str) -> float:
        return sum(m * n for m, n in zip(table[name], table["passed"], strict=True) if n) / passed

    assert mean("gap_mean") == pytest.approx(metrics["rollout_corr/logprob_abs_diff_mean"], rel=1e-6)
    assert max(g for g, n in zip(table["gap_max"], table["passed"], strict=True) if n) == pytest.approx(
        metrics["rollout_corr/logprob_abs_diff_max"], rel=1e-6
    )
    assert mean("entropy") == pytest.approx(metrics["actor/entropy"], rel=1e-6)
    assert mean("clip_frac") == metrics["actor/clip_frac"]
    # The first group learns, where it is not clipped; the second has one reward.
    assert table["silent"][3:] == [5, 2]
    assert all(flag & Why.ZERO_ADVANTAGE for flag in table["flags"][3][2:])
    if source == "recompute":
        assert table["silent"][:3] == [0, 0, 0]
