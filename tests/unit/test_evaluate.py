"""Evaluation feeds the engines at the rate they take it, judges as training does, and states its own error."""

import asyncio
import math
import threading

import pytest

from rl.config import Config, RolloutConfig
from rl.loop.evaluate import evaluate, standard_error
from rl.loop.players import MAX_SCORING
from rl.rewards.score import RewardError
from rl.types import Completion, Data, Prompt


class Engines:
    """Counts the requests that are under way, and answers in the next turns of the event loop."""

    def __init__(self):
        self.under_way = self.most = self.cancelled = 0

    async def sample(self, token_ids, n, *, seed, temperature=None):
        self.under_way += n
        self.most = max(self.most, self.under_way)
        try:
            for _ in range(3):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.under_way -= n
        return [Completion(token_ids=[1], logprobs=[0.0], versions=[0], finish_reason="stop")] * n


def evaluated(problems, *, reward=lambda reply: 1.0, engines=None, **settings):
    config = Config(name="t", model="m", data=lambda: Data(train=[]), reward=reward, **settings)
    sets = {"held": [Prompt(ordinal=i, token_ids=[1], task={"index": i}) for i in range(problems)]}
    return asyncio.run(evaluate(config, engines or Engines(), lambda ids: "x", sets))


@pytest.mark.parametrize(("samples", "most"), [(1, 6), (3, 6), (4, 4), (7, 7)])
def test_no_more_is_requested_at_a_time_than_the_engines_decode(samples, most):
    engines = Engines()
    evaluated(8, engines=engines, eval_samples=samples, rollout=RolloutConfig(engines=2, max_num_seqs=3))
    # A group is never cut, so one of more samples than that is requested as a whole.
    assert engines.most == most


def test_no_more_replies_are_judged_at_a_time_than_in_training():
    judging, most, lock, full = 0, 0, threading.Lock(), threading.Event()

    def reward(reply):
        nonlocal judging, most
        with lock:
            judging += 1
            most = max(most, judging)
        if most == MAX_SCORING:
            full.set()
        full.wait(10)
        with lock:
            judging -= 1
        return 1.0

    evaluated(150, reward=reward, rollout=RolloutConfig(max_num_seqs=1000))
    assert most == MAX_SCORING


def test_a_reward_that_fails_ends_the_evaluation_and_what_is_still_sampled():
    engines = Engines()

    def reward(reply):
        raise KeyError("answer")

    with pytest.raises(RewardError, match="raised KeyError: 'answer'"):
        evaluated(30, reward=reward, engines=engines, rollout=RolloutConfig(max_num_seqs=1))
    assert engines.under_way == 0


def test_the_error_is_that_of_a_sample_and_unknown_for_a_single_problem():
    # Rewards 0, 1, 1, 1: mean 3/4, sample variance 1/4, so the mean's error is sqrt(1/4 / 4).
    metrics = evaluated(4, reward=lambda reply: float(reply.task["index"] > 0))
    assert metrics["eval/held/avg@1"] == 0.75
    assert metrics["eval/held/avg@1_se"] == pytest.approx(0.25)
    assert math.isnan(evaluated(1)["eval/held/avg@1_se"])
    assert math.isnan(standard_error([0.5]))


def test_parts_that_add_up_to_one_but_for_rounding_pass():
    assert 0.7 + 0.2 + 0.1 < 1.0
    metrics = evaluated(2, reward=lambda reply: {"right": 0.7, "form": 0.2, "short": 0.1})
    assert metrics["eval/held/pass@1"] == 1.0
    assert evaluated(2, reward=lambda reply: 0.999)["eval/held/pass@1"] == 0.0
