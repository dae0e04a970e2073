"""Evaluation feeds the engines at the rate they take it, judges as training does, and states its own error."""

import asyncio
import math
import random
import threading
from dataclasses import replace

import pytest

from rl.config import Config, RolloutConfig
from rl.data import Eval
from rl.loop.estimates import standard_error
from rl.loop.evaluate import AGAIN, evaluate, held_out
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


def evaluation(problems, sets, *, reward=lambda reply: 1.0, engines=None, decode=lambda ids: "x", **settings):
    config = Config(name="t", model="m", data=lambda: Data(train=[]), reward=reward, **settings)
    prompts = [Prompt(ordinal=i, token_ids=[1], task={"index": i}) for i in range(problems)]
    sets = {name: held_out(config, each, prompts) for name, each in sets.items()}
    return asyncio.run(evaluate(config, engines or Engines(), decode, sets))


def evaluated(problems, **settings):
    return evaluation(problems, {"held": Eval(examples=[])}, **settings).metrics


@pytest.mark.parametrize(("samples", "most"), [(1, 6), (3, 6), (4, 4), (7, 7)])
def test_no_more_is_requested_at_a_time_than_the_engines_decode(samples, most):
    engines = Engines()
    evaluated(8, engines=engines, eval_samples=samples, rollout=RolloutConfig(engines=2, max_num_seqs=3))
    # A group is never cut, so one of more samples than that is requested as a whole.
    assert engines.most == most


@pytest.mark.slow
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


class Seeded(Engines):
    """Answers with a token that the seed decides, and remembers what was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    async def sample(self, token_ids, n, *, seed, temperature=None):
        self.asked.append((n, seed, temperature))
        drawn = [random.Random(f"{seed}:{i}").randrange(3) for i in range(n)]
        return [Completion(token_ids=[t], logprobs=[0.0], versions=[0], finish_reason="stop") for t in drawn]


def test_a_set_has_the_runs_settings_where_it_has_none_of_its_own():
    engines = Seeded()
    sets = {
        "plain": Eval(examples=[]),
        "own": Eval(
            examples=[], samples=4, temperature=0.0, reward=lambda reply: 0.25, answer=lambda reply: reply.text
        ),
    }
    found = evaluation(3, sets, engines=engines, eval_samples=2, eval_temperature=0.5).metrics
    assert {(n, temperature) for n, _, temperature in engines.asked} == {(2, 0.5), (4, 0.0)}
    shown = {name for name in found if not name.endswith("_se")}
    assert shown == {f"eval/plain/{f}" for f in ("avg@2", "pass@1", "pass@2")} | {
        f"eval/own/{f}" for f in ("avg@4", "pass@1", "pass@2", "pass@4", "maj@4")
    }
    assert (found["eval/plain/avg@2"], found["eval/own/avg@4"]) == (1.0, 0.25)


@pytest.mark.slow
def test_votes_are_of_the_answers_that_the_sets_function_reads():
    zero = lambda reply: float(reply.token_ids == [0])  # noqa: E731
    sets = {"held": Eval(examples=[], samples=5, reward=zero, answer=lambda reply: reply.token_ids[0])}
    found = evaluation(40, sets, engines=Seeded())
    for problem in found.problems["held"].values():
        share = problem["avg@5"]
        assert (problem["maj@5"] == 1.0) if share > 0.5 else (problem["maj@5"] < 1.0 or share == 0.4)
    assert 0.1 < found.metrics["eval/held/maj@5"] < 0.9


@pytest.mark.parametrize("answer", [lambda reply: [reply.text], lambda reply: reply.task["answer"]])
def test_an_answer_that_cannot_be_counted_ends_the_evaluation(answer):
    with pytest.raises(RewardError, match="must return a text, a number or None as answer"):
        evaluation(2, {"held": Eval(examples=[], answer=answer)})


@pytest.mark.slow
def test_equal_seeds_give_equal_figures_and_others_independent_ones():
    config = Config(name="t", model="m", data=Data(train=[]), reward=lambda reply: float(reply.token_ids == [0]))
    prompts = [Prompt(ordinal=i, token_ids=[1], task={}) for i in range(60)]
    sets = {"held": held_out(config, Eval(examples=[]), prompts)}

    def asked(**seeds):
        engines = Seeded()
        found = asyncio.run(evaluate(config, engines, lambda ids: "x", sets, **seeds))
        return found, {seed for _, seed, _ in engines.asked}

    (first, seeds), (same, _), (other, others) = asked(), asked(), asked(seeds=AGAIN)
    assert first == same
    assert not seeds & others
    assert first.problems != other.problems


def test_a_reply_that_the_engine_aborted_is_sampled_again():
    class Aborting(Seeded):
        async def sample(self, token_ids, n, **more):
            found = await super().sample(token_ids, n, **more)
            return [replace(c, finish_reason="abort") for c in found] if len(self.asked) == 1 else found

    engines = Aborting()
    assert evaluated(1, engines=engines)["eval/held/avg@1"] == 1.0
    assert len(engines.asked) == 2


def test_each_set_has_its_own_cadence():
    config = Config(name="t", model="m", data=Data(train=[]), reward=len, eval_every=5)
    every = {None: [0, 5, 10, 12], 4: [0, 4, 8, 12], 0: [0, 12]}
    for given, steps in every.items():
        one = held_out(config, Eval(examples=[], every=given), [])
        assert [step for step in range(13) if one.due(step, 12)] == steps
