"""Rewards that ask a judge, in a loop, an evaluation and an episode: no failure is a reward or loses a prompt."""

import asyncio
import itertools
import json
import random
from dataclasses import replace

import pytest

from episodes import Calculator, Chat, Engine, prompt, solves
from episodes import text as as_characters
from judge_server import judge_server
from log import Log
from rl.config import Config, RolloutConfig, TrackingConfig
from rl.data import Eval
from rl.environments.host import ThreadHost
from rl.judges import Calls, OpenAIJudge, desk, number_after
from rl.loop.evaluate import evaluate, held_out
from rl.loop.loop import Loop
from rl.loop.players import in_environment, stage_of
from rl.loop.stream import stream
from rl.protocols import EnvError, SyncReport
from rl.rewards.combined import OverGroup
from rl.types import Completion, Data, Prompt
from trainer.tracking.tracker import RunTracker

PROMPTS = [Prompt(ordinal=i, token_ids=[i], task={}, given=f"prompt {i}") for i in range(5)]


# To check the types of every call takes half of the time, and an int is a number too.
pytestmark = pytest.mark.usefixtures("unchecked_types")


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    """The waits between tries take no time."""

    async def at_once(seconds):
        await asyncio.sleep(0)

    monkeypatch.setattr(desk, "sleep", at_once)


class Engines:
    """Every reply is another text."""

    def __init__(self):
        self.numbers = itertools.count(100)

    async def sample(self, token_ids, n, *, seed, temperature=None):
        await asyncio.sleep(0)
        tokens = [next(self.numbers) for _ in range(n)]
        return [Completion(token_ids=[t], logprobs=[-1.0], versions=[0], finish_reason="stop") for t in tokens]


class Trainer:
    def __init__(self, engines):
        self.engines = engines

    async def step(self, batch):
        return {}

    async def publish(self, version):
        self.engines.version = version
        return SyncReport(seconds=0.0, pause_seconds=0.0, bytes=0, verified=True)


def worth(text):
    """What the judge thinks of a reply: 1 to 9, never 0."""
    return 1 + int(text) % 9


def judge_at(server, **settings):
    given = {"model": "m", "prompt": "{prompt}: {reply}", "parse": number_after("Score:", 1, 9)}
    return OpenAIJudge(url=server.url, **given | settings)


def asks(judge):
    async def reward(reply):
        return await judge(reply.prompt, reply.text)

    return reward


def verdict(body, number):
    reply = body["messages"][0]["content"].rpartition(": ")[2]
    return f"As reply {reply}: Score: {worth(reply)}"


def config_of(judge, **settings):
    given = {"name": "t", "model": "m", "data": Data(train=[]), "judges": (judge,)}
    settings = {"prompts_per_step": 2, "group_size": 2, "steps": 6} | settings
    reward = {} if "env" in settings or "reward" in settings else {"reward": asks(judge)}
    return Config(**given | reward | settings)


class Kept(Log):
    """Keeps the trajectories of all steps."""

    def __init__(self):
        super().__init__()
        self.trajectories = []


def loop_of(config, engines=None, player=None):
    engines, kept = engines or Engines(), Kept()
    return Loop(
        config=config,
        rollouts=engines,
        learner=Trainer(engines),
        prompts=stream(PROMPTS, 0),
        decode=lambda ids: " ".join(map(str, ids)),
        tracker=kept,
        player=player,
        on_samples=lambda step, trajectories: kept.trajectories.extend(trajectories),
    )


def run(loop):
    asyncio.run(asyncio.wait_for(loop.run(), 60))
    return loop


def faulty(share, seed):
    """A fifth of the calls fail, by the seed, in every way that a server has."""
    r = random.Random(seed)
    kinds = [(429, {"Retry-After": "1"}, ""), (500, {}, "oops"), "<hang>", "<close>", "It is fine.", (200, {}, "{")]

    def answer(body, number):
        return r.choice(kinds) if r.random() < share else verdict(body, number)

    return answer


@pytest.mark.parametrize("seed", range(3))
def test_a_fifth_of_failing_calls_costs_no_wrong_reward_and_no_prompt(seed):
    with judge_server(faulty(0.2, seed)) as server:
        judge = judge_at(server, calls=Calls(try_s=0.2, tries=4))
        loop = run(loop_of(config_of(judge, max_failed=0.0, steps=20)))
    trained = loop.tracker.trajectories
    assert len(trained) == 80
    assert [t.reward for t in trained] == [worth(t.token_ids[-1]) for t in trained]
    ends = loop.admission.ledger.summary()
    assert {end for end, n in ends.items() if n} <= {"trained", "pending"}
    assert ends["trained"] == 40
    assert sum(row["judge/m/tries"] for row in loop.tracker.rows) > len(loop.tracker.rows)
    assert len(server.requests) > 85, "no call failed"


def test_a_judge_that_is_down_ends_the_run_with_its_name():
    with judge_server(verdict) as server:
        pass
    judge = judge_at(server, name="helpful", calls=Calls(tries=2))
    loop = loop_of(config_of(judge, rollout=RolloutConfig(retries=1)))
    with pytest.raises(EnvError, match=r"groups failed because of a judge.*the judge 'helpful' \(m at .*ConnectError"):
        run(loop)
    assert loop.tracker.trajectories == loop.tracker.rows == []
    # max_failed is a tenth of 50 groups.
    assert loop.admission.ledger.summary()["failed(judge_error)"] >= 6


def test_a_group_of_which_the_judge_reads_one_reply_never_is_failed_and_another_takes_its_place():
    def answer(body, number):
        return "I cannot say." if body["messages"][0]["content"].endswith(": 102") else verdict(body, number)

    with judge_server(answer) as server:
        loop = run(loop_of(config_of(judge_at(server, calls=Calls(tries=2)), rollout=RolloutConfig(retries=1))))
    ends = loop.admission.ledger.summary()
    assert (ends["failed(judge_error)"], ends["trained"]) == (1, 12)
    assert 102 not in [t.token_ids[-1] for t in loop.tracker.trajectories]
    asked = [body["messages"][0]["content"].endswith(": 102") for body in server.requests]
    assert sum(asked) == 4, "two tries, twice"


def test_the_raw_verdict_is_kept_with_the_sample_that_it_is_about(tmp_path):
    with judge_server(verdict) as server:
        loop = run(loop_of(config_of(judge_at(server), steps=2)))
    trained = loop.tracker.trajectories
    assert [[(v.judge, v.score, v.raw) for v in t.verdicts] for t in trained] == [
        [("m", t.reward, f"As reply {t.token_ids[-1]}: Score: {t.reward:g}")] for t in trained
    ]
    tracker = RunTracker(folder=tmp_path, config=TrackingConfig(wandb="off"), name="t", settings={})
    tracker.samples(1, [trained[0], replace(trained[1], verdicts=())], lambda ids: "")
    tracker.close({})
    judged, bare = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    assert judged["verdicts"] == [{"judge": "m", "score": trained[0].reward, "raw": trained[0].verdicts[0].raw}]
    assert "verdicts" not in bare


def test_a_judge_ranks_a_whole_group_and_a_verdict_about_one_reply_stays_with_it():
    with judge_server(verdict) as server:
        judge = judge_at(server, prompt="{reply}", parse=lambda raw: float(len(raw)))

        async def ranks(replies):
            one = [await judge("", f": {reply.text}") for reply in replies]
            both = await judge("", ": " + "".join(reply.text for reply in replies))
            return [score + both for score in one]

        loop = run(loop_of(config_of(judge, steps=1, reward=OverGroup(ranks))))
    trained = loop.tracker.trajectories
    assert [len(t.verdicts) for t in trained] == [2] * 4
    for t in trained:
        assert t.verdicts[0].raw.startswith(f"As reply {t.token_ids[-1]}:")


# -- evaluations -------------------------------------------------------------------------------------------------------


def evaluated(server, share=0.4, **settings):
    judge = judge_at(server, calls=Calls(tries=1))
    config = config_of(judge, max_failed=share, rollout=RolloutConfig(retries=0), **settings)
    sets = {"held": held_out(config, Eval(examples=[]), PROMPTS)}
    decode = lambda ids: " ".join(map(str, ids))  # noqa: E731
    return asyncio.run(evaluate(config, Engines(), decode, sets)).metrics


def test_a_problem_that_no_judge_can_score_is_left_out_and_counted():
    with judge_server(lambda body, n: (500, {}, "") if "prompt 3" in str(body) else verdict(body, n)) as server:
        metrics = evaluated(server)
    assert metrics["eval/held/failed_frac"] == 0.2
    assert metrics["eval/held/avg@1"] >= 1.0


def test_an_evaluation_without_any_verdict_ends_with_the_name_of_the_judge():
    with judge_server(lambda body, n: (500, {}, "")) as server:
        with pytest.raises(EnvError, match=r"every problem of the set 'held' failed. The first: the judge 'm'"):
            evaluated(server)


# -- episodes ----------------------------------------------------------------------------------------------------------


def episodes_of(judge, **settings):
    class Judged(Calculator):
        async def reward(self, episode):
            return await judge(episode.messages, episode.text)

        async def reply(self, turn):
            await judge("turn", turn.text)

    config = config_of(judge, env=Judged, steps=1, **settings)
    engine = Engine(solves)
    stage = replace(stage_of(config, engine, as_characters, Chat(), ThreadHost(env=Judged)), max_model_len=2000)
    loop = loop_of(config, engine, in_environment(config, stage))
    loop.groups.prompts = iter([prompt(f"2*3+{i}", ordinal=i) for i in range(20)])
    return loop


def test_an_environment_awaits_a_judge_and_its_verdicts_are_kept_with_the_episode():
    with judge_server(verdict) as server:
        loop = run(episodes_of(judge_at(server)))
    trained = loop.tracker.trajectories
    assert len(trained) == 4
    for t in trained:
        number = 6 + t.group
        assert t.reward == worth(number)
        assert [v.raw for v in t.verdicts] == [f"As reply {number}: Score: {worth(number)}"] * 2


def test_an_episode_whose_judge_fails_is_played_again_and_then_its_group_has_failed():
    with judge_server(lambda body, n: (500, {}, "") if "turn" not in str(body) else verdict(body, n)) as server:
        judge = judge_at(server, calls=Calls(tries=1))
        loop = episodes_of(judge, rollout=RolloutConfig(retries=1), max_failed=0.02)
        with pytest.raises(EnvError, match=r"because of a judge.*`reward` got no verdict: the judge 'm'"):
            run(loop)
    assert loop.admission.ledger.summary()["failed(judge_error)"] == 2
    assert loop.groups.tally.replayed >= 2
    assert loop.tracker.trajectories == []
