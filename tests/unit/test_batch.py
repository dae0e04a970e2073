"""Trajectories to tensors, and a step cut into micro-batches: on literal tokens."""

from dataclasses import replace

import pytest
import torch

from rl.batch import collate, micro_batches, take, trajectory
from rl.types import Batch, Completion, Prompt, Trajectory
from trainer.model.packing import pack

TWO_TURNS = Trajectory(
    group=5,
    token_ids=[10, 11, 12, 13, 14, 15],  # prompt 10 11, sampled 12, tool reply 13, sampled 14 15
    mask=[False, False, True, False, True, True],
    logprobs=[0.0, 0.0, -0.2, 0.0, -0.4, -0.5],
    versions=[-1, -1, 3, -1, 4, 4],
    reward=1.5,
)
SHORT = Trajectory(
    group=2,
    token_ids=[20, 21, 22],
    mask=[False, False, True],
    logprobs=[0.0, 0.0, -2.5],
    versions=[-1, -1, 7],
    reward=-1.0,
)


def test_a_trajectory_joins_prompt_and_completion_token_by_token():
    prompt = Prompt(ordinal=9, token_ids=[1, 2], task={})
    completion = Completion(token_ids=[3, 4], logprobs=[-0.3, -0.4], versions=[0, 1], finish_reason="length")
    t = trajectory(prompt, completion, 0.5, {"format": 0.5})
    assert (t.group, t.reward, t.reward_parts, t.finish_reason) == (9, 0.5, {"format": 0.5}, "length")
    assert [*t.token_ids] == [1, 2, 3, 4]
    assert [*t.mask] == [False, False, True, True]
    assert [*t.logprobs] == pytest.approx([0.0, 0.0, -0.3, -0.4])
    assert [*t.versions] == [-1, -1, 0, 1]


def test_column_t_speaks_about_the_prediction_of_token_t_plus_1():
    batch = collate([TWO_TURNS, SHORT])
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14, 15], [20, 21, 22, 0, 0, 0]]
    assert batch.mask.long().tolist() == [[0, 1, 0, 1, 1], [0, 1, 0, 0, 0]]
    assert torch.allclose(batch.rollout_logprobs, torch.tensor([[0, -0.2, 0, -0.4, -0.5], [0, -2.5, 0, 0, 0]]))
    assert batch.versions.tolist() == [[-1, 3, -1, 4, 4], [-1, 7, -1, -1, -1]]
    assert batch.rewards.tolist() == [1.5, -1.0]
    assert batch.group_ids.tolist() == [5, 2]
    # Reading it as the trainer does gives back the sampled tokens with their own log-probabilities.
    assert batch.input_ids[:, 1:][batch.mask].tolist() == [12, 14, 15, 22]
    assert batch.rollout_logprobs[batch.mask].tolist() == pytest.approx([-0.2, -0.4, -0.5, -2.5])


# What truncation kept when 12, 14 and 15 were sampled, and 22.
KEPT = [
    replace(TWO_TURNS, support=[[], [], [12, 40], [], [14], [7, 15, 3]]),
    replace(SHORT, support=[[], [], [22, 50]]),
]


def test_a_trajectory_keeps_what_truncation_kept_for_its_sampled_tokens():
    prompt = Prompt(ordinal=9, token_ids=[1, 2], task={})
    completion = Completion(
        token_ids=[3, 4], logprobs=[-0.3, -0.4], versions=[0, 1], finish_reason="stop", support=[[3, 8], [4]]
    )
    assert trajectory(prompt, completion, 0.5, {}).support == [[], [], [3, 8], [4]]
    assert trajectory(prompt, replace(completion, support=None), 0.5, {}).support is None


def test_column_t_holds_what_token_t_plus_1_was_sampled_from():
    batch = collate(KEPT)
    nothing = [-1, -1, -1]
    assert batch.support.tolist() == [
        [nothing, [12, 40, -1], nothing, [14, -1, -1], [7, 15, 3]],
        [nothing, [22, 50, -1], nothing, nothing, nothing],
    ]
    # Read as the trainer reads it, every sampled token is among its own.
    sampled, kept = batch.input_ids[:, 1:][batch.mask], batch.support[batch.mask]
    assert (kept == sampled[:, None]).any(1).all()
    assert collate([TWO_TURNS, SHORT]).support is None


def test_taking_rows_takes_what_truncation_kept_along():
    batch = collate(KEPT)
    assert take(batch, torch.tensor([1])).support.tolist() == [[[-1, -1, -1], [22, 50, -1]]]
    assert take(batch, torch.tensor([1, 0])).support.tolist() == batch.support[[1, 0]].tolist()
    assert take(batch, torch.empty(0, dtype=torch.long)).support.shape[0] == 1
    assert take(collate([SHORT]), torch.tensor([0])).support is None
    moved = batch.to_device(torch.device("meta")).support
    assert moved.is_meta
    assert moved.shape == batch.support.shape


def test_kept_ids_for_some_rows_or_some_tokens_only_are_an_error():
    with pytest.raises(AssertionError, match="some trajectories have the ids that truncation kept"):
        collate([KEPT[0], SHORT])
    with pytest.raises(AssertionError, match="group 2: kept ids belong to sampled tokens"):
        collate([KEPT[0], replace(SHORT, support=[[], [], []])])
    with pytest.raises(AssertionError, match="group 2: kept ids belong to sampled tokens"):
        collate([KEPT[0], replace(SHORT, support=[[], [21], [22]])])


def test_taking_short_rows_cuts_the_columns_they_do_not_need():
    part = take(collate([TWO_TURNS, SHORT]), torch.tensor([1]))
    assert part.input_ids.tolist() == [[20, 21, 22]]
    assert part.mask.tolist() == [[False, True]]
    assert part.rollout_logprobs.tolist() == [[0.0, -2.5]]
    assert part.versions.tolist() == [[-1, 7]]
    assert (part.rewards.tolist(), part.group_ids.tolist()) == ([-1.0], [2])
    assert part.old_logprobs is None


def test_taking_rows_keeps_their_order_and_every_column_of_the_longest():
    batch = collate([TWO_TURNS, SHORT])
    part = take(batch, torch.tensor([1, 0]))
    assert part.input_ids.tolist() == batch.input_ids[[1, 0]].tolist()
    assert part.group_ids.tolist() == [2, 5]


def test_an_empty_reply_still_has_a_column():
    silent = replace(SHORT, token_ids=[20], mask=[False], logprobs=[0.0], versions=[-1])
    part = take(collate([TWO_TURNS, silent]), torch.tensor([1]))
    assert part.input_ids.shape == (1, 2)
    assert part.mask.tolist() == [[False]]


def test_taking_no_rows_gives_a_row_that_adds_nothing():
    part = take(collate([TWO_TURNS, SHORT]), torch.empty(0, dtype=torch.long))
    assert len(part.input_ids) == 1
    assert not part.mask.any()
    assert part.input_ids.shape[1] == part.mask.shape[1] + 1 > 1, "the forward pass still needs a column"


def groups_of(sizes, prompt, replies) -> Batch:
    """Groups of the given sizes; row r of the step has a reply of replies[r] tokens. Rows are shuffled."""
    trajectories, r = [], 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            n = replies[r]
            trajectories.append(
                Trajectory(
                    group=group,
                    token_ids=[group] * prompt + [9] * n,
                    mask=[False] * prompt + [True] * n,
                    logprobs=[0.0] * prompt + [-1.0] * n,
                    versions=[-1] * prompt + [0] * n,
                    reward=0.0,
                )
            )
            r += 1
    order = torch.randperm(r, generator=torch.Generator().manual_seed(0)).tolist()
    return collate([trajectories[i] for i in order])


STEP = groups_of([4, 4, 4, 4, 2], prompt=5, replies=[3, 7, 2, 9, 1, 1, 8, 4, 6, 6, 6, 6, 2, 30, 2, 2, 5, 5])


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("budget", [1, 20, 45, 10**6])
def test_micro_batches_hold_each_row_once_and_equally_many_per_rank(share_prompts, ranks, budget):
    rows = torch.tensor([r for r in range(18) if r not in (3, 11)])  # two rows have nothing to learn
    cut = micro_batches(STEP, rows, ranks=ranks, budget=budget, share_prompts=share_prompts)
    assert len(cut) == ranks
    assert len({len(rank) for rank in cut}) == 1
    assert sorted(r for rank in cut for micro in rank for r in micro.tolist()) == rows.tolist()
    assert all(micro.dtype == torch.long for rank in cut for micro in rank)


@pytest.mark.parametrize("budget", [20, 45, 80])
def test_no_micro_batch_of_several_units_exceeds_the_budget(budget):
    replies = STEP.mask.sum(dim=1)
    for share_prompts in (False, True):
        for rank in micro_batches(STEP, torch.arange(18), ranks=2, budget=budget, share_prompts=share_prompts):
            for micro in rank:
                groups = set(STEP.group_ids[micro].tolist())
                units = len(groups) if share_prompts else len(micro)
                # A row of p prompt tokens and n sampled ones is p + n - 1 columns of forward pass.
                prompts = 4 * units
                assert units <= 1 or prompts + int(replies[micro].sum()) <= budget


def test_rows_that_are_not_packed_count_as_long_as_the_longest_beside_them():
    batch = groups_of([1] * 6, prompt=2, replies=[1, 1, 1, 1, 1, 9])
    rows = {"ranks": 1, "budget": 20, "share_prompts": False}
    (packed,), (padded,) = (micro_batches(batch, torch.arange(6), packed=on, **rows) for on in (True, False))
    assert [len(m) for m in packed] == [6]  # 5 * 2 + 10 columns
    assert [len(m) for m in padded] == [5, 1]  # 6 * 10 would be 60


def test_a_budget_for_everything_makes_one_micro_batch():
    ((only,),) = micro_batches(STEP, torch.arange(18), ranks=1, budget=10**6, share_prompts=False)
    assert len(only) == 18


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_groups_stay_together_when_their_prompt_is_shared(ranks):
    # The largest group has 4 columns of prompt, and 40 of replies.
    cut = micro_batches(STEP, torch.arange(18), ranks=ranks, budget=44, share_prompts=True)
    homes: dict[int, set[tuple[int, int]]] = {}
    for k, rank in enumerate(cut):
        for m, micro in enumerate(rank):
            for group in STEP.group_ids[micro].tolist():
                homes.setdefault(group, set()).add((k, m))
    assert sorted(homes) == [0, 1, 2, 3, 4]
    assert all(len(home) == 1 for home in homes.values())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("budget", [5, 13, 30, 43])
def test_a_group_above_the_budget_is_cut_between_its_rows_and_each_part_has_the_prompt(ranks, budget):
    cut = micro_batches(STEP, torch.arange(18), ranks=ranks, budget=budget, share_prompts=True)
    micros = [micro for rank in cut for micro in rank if len(micro)]
    for micro in micros:
        part = take(STEP, micro)
        columns = pack(part.input_ids, part.mask, share_prompts=True).input_ids.numel()
        assert columns <= budget or len(micro) == 1, "only a single row may be longer"
    # The long reply is alone: 4 columns of prompt and 30.
    if budget < 34:
        assert [30] in replies_by_rank(STEP, [[micro] for micro in micros])


def test_work_is_dealt_evenly_over_ranks():
    batch = groups_of([1] * 8, prompt=2, replies=[1, 2, 3, 4, 5, 6, 7, 8])
    cut = micro_batches(batch, torch.arange(8), ranks=2, budget=10**6, share_prompts=False)
    work = [sum(int(batch.mask[m].sum()) for m in rank) for rank in cut]
    assert work == [18, 18]


@pytest.mark.parametrize(("features", "beside_the_longest"), [(None, [8, 26]), (1, [26])])
def test_a_long_row_weighs_more_than_its_tokens_where_attention_does(features, beside_the_longest):
    # Rows of 27 predicted columns and four times 9: 27 against 36, but 27^2 against 4 * 9^2.
    batch = groups_of([1] * 5, prompt=2, replies=[26, 8, 8, 8, 8])
    cut = micro_batches(batch, torch.arange(5), ranks=2, budget=10**6, share_prompts=False, features=features)
    assert beside_the_longest in replies_by_rank(batch, cut)


def test_a_shared_prompt_attends_to_itself_once():
    # A prompt of 40 with two replies of 4 is less work than one of 40 and a reply of 20, but more tokens of rows apart.
    batch = groups_of([2, 1, 1], prompt=40, replies=[4, 4, 20, 1])
    cut = micro_batches(batch, torch.arange(4), ranks=2, budget=10**6, share_prompts=True, features=1)
    assert sorted(replies_by_rank(batch, cut)) == [[1, 4, 4], [20]]


def replies_by_rank(batch, cut) -> list[list[int]]:
    return [sorted(int(n) for micro in rank for n in batch.mask[micro].sum(dim=1)) for rank in cut]
