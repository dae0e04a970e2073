"""The stream of prompts: seeded, complete in every epoch, numbered once."""

from itertools import islice

import pytest

from rl.loop.stream import sample_seed, stream
from rl.types import Prompt

PROMPTS = [Prompt(ordinal=i, token_ids=[100 + i], task={"index": i}) for i in range(10)]


def order(seed, n):
    return [p.task["index"] for p in islice(stream(PROMPTS, seed), n)]


def test_each_epoch_is_a_permutation_of_its_own():
    epochs = [order(0, 40)[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_stream_is_decided_by_its_seed():
    assert order(1, 30) == order(1, 30)
    assert order(1, 30) != order(2, 30)


def test_ordinals_count_on_over_epochs_and_are_never_reused():
    assert [p.ordinal for p in islice(stream(PROMPTS, 0), 35)] == list(range(35))


def test_a_prompt_keeps_its_own_tokens_and_task():
    for p in islice(stream(PROMPTS, 3), 25):
        assert p.token_ids == [100 + p.task["index"]]


def test_an_empty_training_set_is_refused():
    with pytest.raises(ValueError, match=r"training data is empty.*Config\.data"):
        next(stream([], 0))


def test_sample_seeds_leave_room_for_a_group_in_31_bits():
    seeds = [sample_seed(seed, ordinal) for seed in range(4) for ordinal in range(500)]
    assert all(0 <= s < 2**31 - 2**12 for s in seeds)
    assert max(seeds) > 2**30, "the whole range is in use"
    assert len(set(seeds)) == len(seeds)


def test_a_sample_seed_is_the_same_in_every_run():
    # Pinned: a repeated or resumed run must sample the same tokens.
    assert (sample_seed(0, 0), sample_seed(7, 3)) == (1255634721, 1662928035)
