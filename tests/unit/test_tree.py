"""The token tree of an episode: a row is what the engine was asked, and each sampled token is trained exactly once."""

import random
from collections import Counter

import pytest

from cases import nightly_unless
from rl.environments.tree import Tree, _Columns
from rl.types import Completion

HISTORIES = 10_000


def sampled(*token_ids, support=None):
    n = len(token_ids)
    return Completion(
        token_ids=list(token_ids), logprobs=[-1.0] * n, versions=[3] * n, finish_reason="stop", support=support
    )


def rows(tree, reward=1.0):
    return tree.rows(group=5, episode=2, reward=reward, finish_reason="stop")


def test_turns_that_continue_each_other_are_one_row():
    tree = Tree()
    tree.add([1, 2], sampled(10, 11), 0)
    tree.add([1, 2, 10, 11, 3], sampled(12), 1)
    (row,) = rows(tree)
    assert [*row.token_ids] == [1, 2, 10, 11, 3, 12]
    assert [*row.mask] == [False, False, True, True, False, True]
    assert [*row.logprobs] == [0.0, 0.0, -1.0, -1.0, 0.0, -1.0]
    assert [*row.versions] == [-1, -1, 3, 3, -1, 3]
    assert [*row.turns] == [-1, -1, 0, 0, -1, 1]
    assert (row.group, row.episode, row.row, row.reward, row.paid, row.support) == (5, 2, 0, 1.0, None, None)


def test_an_edited_history_is_a_new_row_and_a_shared_turn_is_trained_in_the_first_row_alone():
    tree = Tree()
    tree.add([1], sampled(10), 0)
    tree.add([1, 10, 2], sampled(11), 1)
    tree.add([1, 10, 3], sampled(12), 2)
    first, second = rows(tree)
    assert ([*first.token_ids], [*first.mask]) == ([1, 10, 2, 11], [False, True, False, True])
    assert ([*second.token_ids], [*second.mask]) == ([1, 10, 3, 12], [False, False, False, True])
    assert (second.row, [*second.logprobs], [*second.turns]) == (1, [0.0, 0.0, 0.0, -1.0], [-1, -1, -1, 2])
    assert (first.paid, second.paid) == ((), ((3, 1.0),)), "the reward is paid once, at the end"


def test_the_reward_of_a_turn_is_paid_at_its_last_token():
    tree = Tree()
    tree.add([1], sampled(10, 11), 0).paid = 0.25
    tree.add([1, 10, 11, 2], sampled(12), 1).paid = 0.5
    (row,) = rows(tree, reward=1.75)
    assert row.paid == ((2, 0.25), (4, 1.5))


def test_kept_ids_stand_at_sampled_tokens_alone():
    tree = Tree()
    tree.add([1], sampled(10, support=[[10, 4]]), 0)
    tree.add([2], sampled(11, support=[[11]]), 1)
    assert [row.support for row in rows(tree)] == [[[], [10, 4]], [[], [11]]]


def test_two_samples_of_one_request_are_two_rows():
    tree = Tree()
    tree.add([1, 2], sampled(10), 0)
    tree.add([1, 2], sampled(10), 1)
    assert [([*row.token_ids], [*row.mask]) for row in rows(tree)] == [([1, 2, 10], [0, 0, 1])] * 2


class Recorder:
    """An engine that keeps what it was asked, and what it sampled. Few tokens, so that histories often coincide."""

    def __init__(self, seed):
        self.random, self.asked = random.Random(seed), []

    def sample(self, context):
        n = self.random.randint(1, 3)
        completion = Completion(
            token_ids=[self.random.randint(0, 2) for _ in range(n)],
            logprobs=[-self.random.randrange(1024) / 1024 for _ in range(n)],
            versions=[self.random.randint(0, 3) for _ in range(n)],
            finish_reason="stop",
        )
        self.asked.append((list(context), completion))
        return completion


def history(seed, tree_class=Tree):
    """Two agents that append to their histories, edit and drop parts of them, and repeat requests."""
    engine = Recorder(seed)
    r, tree = engine.random, tree_class()
    agents = [[r.randint(0, 2) for _ in range(r.randint(1, 3))] for _ in range(2)]
    # Of one prompt, or of two.
    agents[1] = list(agents[0]) if r.random() < 0.5 else agents[1]
    for _ in range(r.randint(1, 9)):
        context = agents[r.randrange(2)]
        act = r.choice(["append", "append", "append", "edit", "drop", "retry"])
        if act == "edit":
            context[r.randrange(len(context))] = r.randint(0, 2)
        elif act == "drop" and len(context) > 2:
            at = r.randrange(len(context) - 1)
            del context[at : at + r.randint(1, 3)]
            context += [] if context else [0]
        known = (completion for asked, completion in engine.asked if asked == context)
        stored = next(known, None) if act == "retry" else None
        if stored is None:
            stored = engine.sample(context)
            tree.add(list(context), stored, len(tree.nodes))
        if act != "retry":
            context += [*stored.token_ids, *(r.randint(0, 2) for _ in range(r.randint(0, 2)))]
    return engine, tree


def check(engine, tree):
    """What must hold of every history."""
    trained = Counter()
    asked = {turn: (context, completion) for turn, (context, completion) in enumerate(engine.asked)}
    for row, path in zip(rows(tree), tree.paths(), strict=True):
        assert row.mask.count(True) == sum(turn >= 0 for turn in row.turns)
        context, completion = asked[path[-1].turn]
        assert [*row.token_ids] == context + completion.token_ids, "a row is not what the engine was asked"
        for node in path:
            context, completion = asked[node.turn]
            assert [*row.token_ids[: len(context)]] == context
            here = slice(len(context), len(context) + len(completion.token_ids))
            assert [*row.token_ids[here]] == completion.token_ids
            if row.mask[here.start]:
                trained[node.turn] += 1
                assert [*row.mask[here]] == [True] * len(completion.token_ids)
                assert [*row.logprobs[here]] == completion.logprobs
                assert [*row.versions[here]] == completion.versions
                assert [*row.turns[here]] == [node.turn] * len(completion.token_ids)
        assert row.mask.count(True) == sum(len(asked[t][1].token_ids) for t in {*row.turns} - {-1})
    assert trained == Counter(dict.fromkeys(asked, 1)), "a sampled token is not trained exactly once"
    paid = [((0, row.reward),) if row.paid is None else row.paid for row in rows(tree)]
    assert sum(amount for row in paid for _, amount in row) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("block", nightly_unless(lambda block: block < 2, range(10)))
def test_every_sampled_token_is_trained_once_and_every_row_is_what_the_engine_was_asked(block):
    branched = 0
    for seed in range(block * HISTORIES // 10, (block + 1) * HISTORIES // 10):
        engine, tree = history(seed)
        try:
            check(engine, tree)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        branched += len(tree.paths()) > 1
    assert branched > HISTORIES / 20, "histories are edited as they are meant to be"


class ForgetsTheTail(Tree):
    def add(self, context, completion, turn, after=None):
        return super().add(context[:-1] or context, completion, turn, after)


def test_the_histories_find_a_row_that_the_engine_was_not_asked():
    with pytest.raises(AssertionError, match="not what the engine was asked"):
        all(check(*history(seed, ForgetsTheTail)) is None for seed in range(50))


def test_the_histories_find_a_token_that_is_trained_twice(monkeypatch):
    of_a_row_alone = _Columns.of
    monkeypatch.setattr("rl.environments.tree._Columns.of", lambda path, seen: of_a_row_alone(path, set()))
    with pytest.raises(AssertionError, match="not trained exactly once"):
        all(check(*history(seed)) is None for seed in range(50))
