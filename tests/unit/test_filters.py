"""Which groups are left out, and how a reward is shaped."""

import pytest

from rl.filters import Difficulty, Overlong, ZeroAdvantage, reason, same
from rl.rewards.shaping import SoftOverlong
from rl.types import Reply, Trajectory


def group(*rewards, cut=0):
    ends = ["length"] * cut + ["stop"] * (len(rewards) - cut)
    return [
        Trajectory(group=0, token_ids=[1], mask=[True], logprobs=[0.0], versions=[0], reward=r, finish_reason=end)
        for r, end in zip(rewards, ends, strict=True)
    ]


def test_a_group_of_equal_rewards_has_no_advantage():
    assert ZeroAdvantage()(group(0.5, 0.5)) == "zero_advantage"
    assert ZeroAdvantage()(group(0.5, 0.5, 0.6)) is None


def test_a_group_is_overlong_when_more_than_the_share_was_cut_off():
    assert Overlong(above=0.5)(group(0.0, 1.0, 1.0, 0.0, cut=3)) == "overlong"
    assert Overlong(above=0.5)(group(0.0, 1.0, 1.0, 0.0, cut=2)) is None


def test_the_window_of_difficulty_includes_its_ends():
    window = Difficulty(low=0.25, high=0.75)
    found = [window(group(*r)) for r in ((0.0, 0.4), (0.0, 0.5), (1.0, 0.5), (1.0, 0.6))]
    assert found == ["too_hard", None, None, "too_easy"]
    with pytest.raises(ValueError, match=r"from low=0\.9 to high=0\.1: use low < high"):
        Difficulty(low=0.9, high=0.1)


def test_the_first_filter_with_a_reason_gives_it():
    filters = (Overlong(), ZeroAdvantage())
    assert reason(filters, group(1.0, 1.0, cut=2)) == "overlong"
    assert reason(filters, group(1.0, 1.0)) == "zero_advantage"
    assert reason(filters, group(1.0, 0.0)) is None
    assert reason((), group(1.0, 1.0)) is None
    assert reason((lambda group: False, ZeroAdvantage()), group(1.0, 1.0)) == "zero_advantage"


def reply(tokens):
    return Reply(text="", finished=True, task={}, token_ids=[0] * tokens)


def test_long_replies_are_punished_softly():
    shaped = SoftOverlong(reward=lambda r: 1.0, max_tokens=10, buffer=4)
    assert [shaped(reply(n))["overlong"] for n in (0, 6, 7, 10, 12)] == [0.0, 0.0, -0.25, -1.0, -1.0]
    assert shaped(reply(7)) == {"task": 1.0, "overlong": -0.25}


def test_named_parts_of_a_shaped_reward_are_kept():
    shaped = SoftOverlong(reward=lambda r: {"right": 1.0, "format": 0.5}, max_tokens=10, buffer=10, penalty=2.0)
    assert shaped(reply(5)) == {"right": 1.0, "format": 0.5, "overlong": -1.0}
    with pytest.raises(ValueError, match=r"buffer=0 must be above 0 and at most max_tokens=10"):
        SoftOverlong(reward=lambda r: 1.0, max_tokens=10, buffer=0)


def test_rewards_that_differ_by_rounding_alone_are_equal_and_bounds_include_them():
    parts = [0.7 + 0.2 + 0.1, 1.0]
    assert parts[0] != parts[1]
    assert same(parts)
    assert same([1e7, 1e7 + 1])
    assert not same([0.0, 1e-4])
    assert same([0.3])
    assert ZeroAdvantage()(group(*parts)) == "zero_advantage"
    assert Difficulty(low=1.0, high=2.0)(group(parts[0])) is None
    assert Difficulty(low=0.1, high=0.3)(group(0.1 + 0.2)) is None
