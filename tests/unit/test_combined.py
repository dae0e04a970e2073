"""Several rewards as one, a reward of the whole group, a reward that does not apply, and errors that stay short."""

import asyncio
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from rl.config import Config
from rl.data import Eval
from rl.loop.estimates import estimates
from rl.loop.evaluate import by_problem, evaluate, held_out
from rl.rewards.combined import OverGroup, Weighted, judges_groups
from rl.rewards.result import NOT_APPLICABLE, NotApplicable, Scored
from rl.rewards.score import RewardError, score, score_all, score_in_time
from rl.rewards.shaping import SoftOverlong
from rl.types import Completion, Data, Prompt, Reply
from rl.validate import check


def reply(text="5", tokens=2, **task):
    return Reply(text=text, finished=True, task=task, token_ids=[7] * tokens)


def right(one):
    return float(one.text == "5")


def short(one):
    return {"length": -len(one.token_ids), "bonus": 1.0}


async def judge(one):
    await asyncio.sleep(0)
    return 0.25


GROUP = [reply("5", 1), reply("6", 3), reply("5", 2)]


def ranks(replies):
    """Best is the shortest."""
    order = sorted(replies, key=lambda one: len(one.token_ids))
    return [float(-order.index(one)) for one in replies]


async def later_ranks(replies):
    await asyncio.sleep(0)
    return torch.tensor(ranks(replies))


def test_weights_count_in_the_sum_and_not_in_what_is_logged():
    reward = Weighted({"right": right, "short": (short, 0.5)})
    # 1 + 0.5 (-2 + 1) = 0.5
    assert score(reward, reply(), 0) == (0.5, {"right": 1.0, "short": -1.0, "short/length": -2.0, "short/bonus": 1.0})
    assert not judges_groups(reward)


def test_async_and_other_rewards_can_be_weighted_together():
    reward = Weighted({"right": right, "judge": (judge, 2)})
    assert score(reward, reply(), 0) == (1.5, {"right": 1.0, "judge": 0.25})


def test_a_part_that_does_not_apply_is_left_out_and_a_whole_that_does_not_has_no_number():
    half = Weighted({"right": right, "code": (lambda one: NOT_APPLICABLE, 3.0)})
    assert score(half, reply(), 0) == (1.0, {"right": 1.0})
    assert score(lambda one: {"right": 0.5, "code": NOT_APPLICABLE}, reply(), 0) == (0.5, {"right": 0.5})
    for whole in (
        lambda one: NOT_APPLICABLE,
        lambda one: NotApplicable,
        lambda one: {"code": NOT_APPLICABLE},
        Weighted({"code": lambda one: NOT_APPLICABLE}),
        SoftOverlong(reward=lambda one: NOT_APPLICABLE, max_tokens=4, buffer=4),
    ):
        assert score(whole, reply(), 0)[0] is None


def test_a_function_without_return_is_an_error_and_not_a_reward_that_does_not_apply():
    with pytest.raises(
        RewardError, match=r"is None; return a finite float, .*\(NOT_APPLICABLE where it does not apply\)"
    ):
        score(lambda one: None, reply(), 0)
    with pytest.raises(RewardError, match=r"is None \(in the reward 'code'\); return a finite float"):
        score(Weighted({"right": right, "code": lambda one: None}), reply(), 0)


def test_an_error_names_the_reward_among_several_and_awaits_nothing_in_vain():
    def breaks(one):
        raise KeyError("answer")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RewardError, match=r"raised KeyError: 'answer' \(in the reward 'second'\)"):
            score(Weighted({"first": judge, "second": breaks}), reply(), 0)


def test_a_judge_of_the_group_gives_every_reply_its_score():
    for way in (ranks, later_ranks):
        assert score(OverGroup(way), GROUP, 0) == [(0.0, {}), (-2.0, {}), (-1.0, {})]
    mixed = Weighted({"rank": (OverGroup(ranks), 0.5), "right": right, "judge": judge})
    assert judges_groups(mixed)
    assert score(mixed, GROUP, 0) == [
        (1.25, {"rank": 0.0, "right": 1.0, "judge": 0.25}),
        (-0.75, {"rank": -2.0, "right": 0.0, "judge": 0.25}),
        (0.75, {"rank": -1.0, "right": 1.0, "judge": 0.25}),
    ]
    some = OverGroup(lambda replies: [1.0, NOT_APPLICABLE, {"a": 2.0}])
    assert score(some, GROUP, 0) == [(1.0, {}), (None, {}), (2.0, {"a": 2.0})]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, 2.0], "has 2 scores for 3 replies"),
        (1.0, "is 1.0, not a list with one score for each of 3 replies"),
        ([1.0, None, 2.0], "is None; return a finite float"),
    ],
)
def test_a_judge_must_give_one_score_for_each_reply(answer, message):
    with pytest.raises(RewardError, match=message):
        score(OverGroup(lambda replies: answer), GROUP, 0)


def test_a_group_is_one_call_and_single_replies_are_many():
    calls = []

    async def one_call(reward, asked):
        calls.append(asked)
        return await score_in_time(reward, asked, 3, 5.0)

    assert asyncio.run(score_all(OverGroup(ranks), GROUP, one_call)) == [(0.0, {}), (-2.0, {}), (-1.0, {})]
    assert calls == [GROUP]
    assert asyncio.run(score_all(right, GROUP, one_call)) == [(1.0, {}), (0.0, {}), (1.0, {})]
    assert calls[1:] == GROUP


def test_a_weighted_reward_can_be_shaped_and_one_of_groups_cannot():
    shaped = SoftOverlong(reward=Weighted({"right": (right, 0.5)}), max_tokens=4, buffer=4)
    assert score(shaped, reply(), 0) == (0.0, {"right": 1.0, "overlong": -0.5})
    with pytest.raises(ValueError, match=r"SoftOverlong shapes the reward of one reply"):
        SoftOverlong(reward=OverGroup(ranks), max_tokens=4, buffer=4)


def test_the_rules_of_a_reward_inside_another_are_checked():
    inner = SoftOverlong(reward=right, max_tokens=1024, buffer=8)
    config = Config(name="t", model="m", data=Data(train=[]), reward=Weighted({"right": (inner, 0.5)}))
    with pytest.raises(ValueError, match=r"SoftOverlong\(max_tokens=1024\) punishes by another limit"):
        check(config)


def test_rewards_in_a_wrong_form_are_refused_with_the_right_one():
    with pytest.raises(ValueError, match="Weighted has no reward"):
        Weighted({})
    with pytest.raises(ValueError, match="the weight of 'a' is not finite"):
        Weighted({"a": (right, float("inf"))})
    form = Config.right_form("reward", {"right": right})
    assert form == "is several rewards: write reward=Weighted({'right': right, 'short': (short, 0.2)})"


# -- numbers and messages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [Fraction(1, 2), Decimal("0.5"), np.float16(0.5), Scored(reward=0.5)], ids=repr)
def test_every_kind_of_number_is_a_reward(one):
    assert score(lambda _: one, reply(), 0) == (0.5, {})


@pytest.mark.parametrize(
    "one",
    [1e39, -1e39, 10**400, -(10**400), float("inf"), np.float64(1e39), {"a": 3e38, "b": 3e38}, {"a": 1e39}],
    ids=str,
)
def test_a_number_that_float32_cannot_hold_is_refused_when_it_is_returned(one):
    with pytest.raises(RewardError, match="which is infinite in float32; return a finite float"):
        score(lambda _: one, reply(), 0)
    assert score(lambda _: 3.4e38, reply(), 0) == (3.4e38, {})


class Unshowable:
    def __repr__(self):
        raise RuntimeError("no repr")


@pytest.mark.parametrize(
    "task",
    [
        {"tests": "x" * 5_000_000},
        {"tests": list(range(1_000_000))},
        {f"test {i}": ["y" * 10_000] * 10 for i in range(100)},
        {"object": Unshowable()},
    ],
    ids=["text", "list", "many", "no repr"],
)
def test_a_message_stays_below_a_kilobyte_however_large_the_task(task):
    def breaks(one):
        raise ValueError(str(task.get("tests", "z" * 10_000)))

    async def hangs(one):
        await asyncio.sleep(60)

    asked = Reply(text="\U0010ffff" * 1000, finished=True, task=task, token_ids=[])
    for reward, deadline in ((breaks, 5.0), (lambda one: "a" * 10**6, 5.0), (hangs, 0.05)):
        with pytest.raises(RewardError, match="the reward of prompt 3 ") as raised:
            asyncio.run(score_in_time(reward, asked, 3, deadline))
        assert len(str(raised.value)) < 1000


def test_a_task_is_shown_only_in_an_error():
    class Counted(dict):
        shown = 0

        def __repr__(self):
            Counted.shown += 1
            return super().__repr__()

    task = {"inner": Counted(a=1)}
    score(right, Reply(text="5", finished=True, task=task, token_ids=[]), 0)
    assert Counted.shown == 0


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_problems_to_which_the_reward_does_not_apply_are_counted_and_left_out():
    rewards = enumerate([[1.0, 0.0], [None, 0.5], [None, None], [1.0, 1.0]])
    problems, missing = by_problem({i: (each, None) for i, each in rewards}, 2)
    assert missing == 3 / 8
    assert problems.keys() == {0, 1, 3}
    found = estimates(problems.values())
    assert found["avg@2"] == pytest.approx((0.5 + 0.5 + 1.0) / 3)
    # Half of the first problem's samples pass, none of the second's, all of the last one's.
    assert found["pass@1"] == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    # The variance of 1/2, 0, 1 is 1/4, over 3 problems.
    assert found["pass@1_se"] == pytest.approx((0.25 / 3) ** 0.5)
    assert found["pass@2"] == 1.0, "one sample is no estimate of pass@2, so the second problem is not in it"
    assert by_problem({0: ([None], None)}, 1) == ({}, 1.0)


def test_a_judge_of_the_group_judges_the_samples_of_each_problem():
    class Engines:
        async def sample(self, token_ids, n, *, seed, temperature=None):
            return [
                Completion(
                    token_ids=[7] * (i + 1), logprobs=[0.0] * (i + 1), versions=[0] * (i + 1), finish_reason="stop"
                )
                for i in range(n)
            ]

    config = Config(
        name="t", model="m", data=Data(train=[]), reward=right, eval_reward=OverGroup(ranks), eval_samples=3
    )
    prompts = [Prompt(ordinal=i, token_ids=[i], task={}) for i in range(2)]
    sets = {"held": held_out(config, Eval(examples=[]), prompts)}
    found = asyncio.run(evaluate(config, Engines(), lambda ids, **_: "", sets))
    assert found.metrics["eval/held/avg@3"] == -1.0
