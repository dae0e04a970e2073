"""Replies that are cut off can be left out of the loss, and samples to which the reward does not apply out of all."""

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
import torch

from log import Log
from rl.batch import collate, micro_batches, trained_rows, trajectory
from rl.config import Config
from rl.loop.loop import Loop
from rl.loop.stream import stream
from rl.loss import prepare
from rl.objectives import GRPO, RLOO
from rl.protocols import StallError, SyncReport
from rl.rewards.combined import OverGroup, Weighted
from rl.rewards.result import NOT_APPLICABLE
from rl.types import Completion, Data, Prompt


def completion(length, reason="stop", support=None):
    return Completion(
        token_ids=list(range(20, 20 + length)),
        logprobs=[-0.5] * length,
        versions=[3] * length,
        finish_reason=reason,
        support=support,
    )


def group_of(*ends, rewards, masked=True):
    prompt = Prompt(ordinal=4, token_ids=[1, 2], task={})
    return [
        trajectory(prompt, completion(3, end), r, {}, mask_truncated=masked)
        for end, r in zip(ends, rewards, strict=True)
    ]


def test_a_reply_that_was_cut_off_keeps_its_row_and_has_nothing_to_train_on():
    group = group_of("stop", "length", "stop", rewards=(1.0, 0.0, 0.5))
    assert [t.trained for t in group] == [True, False, True]
    assert sum(group[1].mask) == 3, "the trajectory itself shows what was sampled"
    batch = collate(group)
    assert batch.mask.any(dim=1).tolist() == [True, False, True]
    assert batch.rewards.tolist() == [1.0, 0.0, 0.5]
    assert not batch.rollout_logprobs[1].any()
    assert set(batch.versions[1].tolist()) == {-1}
    assert trained_rows(batch).tolist() == [0, 2]
    assert all(t.trained for t in group_of("length", "stop", rewards=(1.0, 0.0), masked=False))


def test_kept_ids_of_a_masked_reply_are_padding():
    prompt = Prompt(ordinal=0, token_ids=[1], task={})
    kept = [completion(2, end, support=[[20, 9], [21]]) for end in ("stop", "length")]
    batch = collate([trajectory(prompt, c, 0.0, {}, mask_truncated=True) for c in kept])
    assert (batch.support[1] == -1).all()
    assert batch.support[0, 0].tolist() == [20, 9]


@pytest.mark.parametrize("objective", [GRPO(divide_by_std=False), RLOO()], ids=lambda o: type(o).__name__)
def test_the_reward_of_a_masked_reply_counts_in_the_baseline(objective):
    _, advantages = prepare(objective, collate(group_of("stop", "length", "stop", rewards=(1.0, 0.0, 0.5))))
    # The mean of the group is 0.5, of the others 0.25 and 0.5.
    want = {"GRPO": [0.5, 0.0, 0.0], "RLOO": [0.75, 0.0, 0.0]}[type(objective).__name__]
    assert advantages[:, 2].tolist() == pytest.approx(want)
    assert not advantages[1].any()


def test_a_kl_in_the_reward_leaves_the_reward_of_a_masked_reply_as_it_is():
    batch = collate(group_of("stop", "length", rewards=(1.0, 0.5)))
    same = torch.zeros(batch.mask.shape)
    batch = replace(batch, old_logprobs=same, ref_logprobs=same)
    paid, _ = prepare(GRPO(kl_coef=0.1, kl_in="reward", kl_estimator="k1"), batch)
    assert paid.rewards.tolist() == [1.0, 0.5]


def test_rows_with_tokens_alone_are_cut_into_micro_batches():
    batch = collate(group_of("stop", "length", "stop", "length", rewards=(1.0, 0.0, 0.5, 0.0)))
    for share_prompts in (True, False):
        (cut,) = micro_batches(batch, trained_rows(batch), ranks=1, budget=100, share_prompts=share_prompts)
        assert sorted(row for part in cut for row in part.tolist()) == [0, 2]


class Engines:
    """Replies of three tokens, none of which is cut off."""

    calls = 0

    async def sample(self, token_ids, n, *, seed, temperature=None):
        self.calls += 1
        await asyncio.sleep(0)
        return [replace(completion(3), versions=[0] * 3) for _ in range(n)]


class Cutting(Engines):
    """Every second reply of a group is cut off; every reply of the first group is."""

    async def sample(self, token_ids, n, *, seed, temperature=None):
        all_of_them = not self.calls
        replies = await super().sample(token_ids, n, seed=seed)
        return [replace(c, finish_reason="length") if all_of_them or i % 2 else c for i, c in enumerate(replies)]


class Trainer:
    def __init__(self):
        self.batches = []

    async def step(self, batch):
        self.batches.append(batch)
        return {"actor/grad_norm": 1.0}

    async def publish(self, version):
        return SyncReport(seconds=0.0, pause_seconds=0.0, bytes=0, verified=True)


def run(engines, **settings):
    """Six steps of two groups of two; the loop after them."""
    given = {"name": "t", "model": "m", "data": Data(train=[]), "reward": lambda reply: 1.0} | settings

    prompts = [Prompt(ordinal=i, token_ids=[i], task={"index": i}) for i in range(5)]
    loop = Loop(
        config=Config(steps=6, prompts_per_step=2, group_size=2, **given),
        rollouts=engines,
        learner=Trainer(),
        prompts=stream(prompts, 0),
        decode=lambda ids: " ".join(map(str, ids)),
        tracker=Log(),
    )
    asyncio.run(asyncio.wait_for(loop.run(), 20))
    return loop


def test_a_run_masks_what_was_cut_off_and_leaves_out_a_group_of_nothing_else():
    loop = run(Cutting(), mask_truncated=True)
    for batch in loop.learner.batches:
        assert batch.mask.any(dim=1).tolist() == [True, False] * 2
    assert {row["response_length/masked_frac"] for row in loop.tracker.rows} == {0.5}
    assert {row["response_length/mean"] for row in loop.tracker.rows} == {3.0}, "lengths are of all replies"
    ledger = loop.admission.ledger.summary()
    assert (ledger["filtered(all_truncated)"], ledger["trained"]) == (1, 12)
    assert [row["filter/taken_frac"] for row in loop.tracker.rows if "filter/taken_frac" in row] == [
        pytest.approx(1 / 3, abs=0.1)
    ]


def test_without_the_option_cut_replies_are_trained_on():
    loop = run(Cutting())
    assert all(batch.mask.any(dim=1).all() for batch in loop.learner.batches)
    assert "response_length/masked_frac" not in loop.tracker.rows[0]


def test_a_sample_without_a_reward_is_in_no_batch_and_is_counted():
    seen = Counter()

    def sometimes(reply):
        seen[reply.task["index"]] += 1
        # One of the two replies of prompt 1, both of prompt 2, and none of the others.
        n = seen[reply.task["index"]]
        return NOT_APPLICABLE if reply.task["index"] == 2 or (reply.task["index"] == 1 and n % 2) else 0.5

    loop = run(Engines(), reward=sometimes)
    batches = loop.learner.batches
    assert {len(batch.rewards) for batch in batches} == {3, 4}
    for batch in batches:
        assert set(batch.rewards.tolist()) == {0.5}, "never 0"
    ledger = loop.admission.ledger.summary()
    assert ledger["trained"] == 12
    assert ledger["filtered(not_applicable)"] >= 2
    fractions = [row["reward/not_applicable_frac"] for row in loop.tracker.rows if "reward/not_applicable_frac" in row]
    assert fractions
    assert all(0 < x < 1 for x in fractions)


def test_a_reward_that_never_applies_ends_the_run_with_the_reason():
    message = r"filtered\(not_applicable\).*mean reward none, because the reward never applied"
    with pytest.raises(StallError, match=message):
        run(Engines(), reward=lambda reply: NOT_APPLICABLE, max_filtered=1)


def test_a_judge_of_the_group_is_called_once_per_group_and_parts_that_did_not_apply_are_counted():
    calls = []

    def order(replies):
        calls.append(len(replies))
        return [float(i) for i in range(len(replies))]

    def odd(reply):
        return 1.0 if reply.task["index"] % 2 else NOT_APPLICABLE

    loop = run(Engines(), reward=Weighted({"order": (OverGroup(order), 0.5), "odd": odd}))
    assert set(calls) == {2}
    assert len(calls) >= 12
    for batch in loop.learner.batches:
        assert {round(b - a, 6) for a, b in batch.rewards.reshape(-1, 2).tolist()} == {0.5}
    row = loop.tracker.rows[0]
    assert row["reward/order/mean"] == 0.5, "the part is logged without its weight"
    left = [row["reward/odd/left_out_frac"] for row in loop.tracker.rows if "reward/odd/left_out_frac" in row]
    assert 0.5 in left
