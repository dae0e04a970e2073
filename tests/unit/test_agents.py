"""Does an agent with a loop of its own give rows and a reward, and do its errors never become one?"""

import asyncio
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import openai
import pytest

from clients import endpoint
from rl.agents.play import Hosted, Stage, play_agent
from rl.environments.host import ThreadHost
from rl.environments.types import EnvError, EnvLate, Limits
from rl.protocols import EngineLost
from rl.rewards.result import NOT_APPLICABLE
from rl.types import Prompt

PROMPT = Prompt(ordinal=3, token_ids=[1], task={"answer": "5"}, given=[{"role": "user", "content": "2+3"}])
COMMAND = """
import json, os, openai
asked = json.loads(os.environ["UNISON_MESSAGES"])
reply = openai.OpenAI().chat.completions.create(model=os.environ["UNISON_MODEL"], messages=asked)
print("thinking ...")
print(float(reply.choices[0].message.content == json.loads(os.environ["UNISON_TASK"])["answer"]))
"""


class Local:
    """The servers of a fleet with one engine, in this process."""

    def __init__(self, served):
        self.served = served

    async def open(self, opening):
        return 0, self.served.open(opening)

    async def end(self, engine, secret):
        return await self.served.end(secret)


def play(folder, agent, *, says=("5",), prepare=lambda engine: None, limits=None, mask_truncated=False, **settings):
    """The rows of one episode, its stage and its engine."""

    async def main():
        served, engine = endpoint(folder, says=says, **settings)
        prepare(engine)
        await served.start()
        stage = Stage(
            host=ThreadHost(env=partial(Hosted, agent)),
            endpoints=Local(served),
            limits=limits or Limits(turns=4),
            model="tiny",
            mask_truncated=mask_truncated,
        )
        try:
            rows = await play_agent(stage, PROMPT, 1, 0, None)
            return SimpleNamespace(rows=rows, counts=stage.counts, engine=engine, open=dict(served.episodes))
        finally:
            assert not served.episodes, "an episode was left open"
            assert not engine.running, "the engine samples for an episode that has ended"
            await served.close()

    return asyncio.run(main())


async def one_question(ctx):
    client = openai.AsyncOpenAI(base_url=ctx.base_url, api_key=ctx.api_key, max_retries=0)
    reply = await client.chat.completions.create(model=ctx.model, messages=ctx.messages)
    return float(reply.choices[0].message.content == ctx.task["answer"])


def one_question_in_a_thread(ctx):
    client = openai.OpenAI(base_url=ctx.base_url, api_key=ctx.api_key, max_retries=0)
    reply = client.chat.completions.create(model=ctx.model, messages=ctx.messages)
    return {"right": float(reply.choices[0].message.content == ctx.task["answer"])}


A_COMMAND = pytest.param(["python", "-c", COMMAND], marks=pytest.mark.slow)
A_CRASH = pytest.param([sys.executable, "-c", "raise SystemExit(3)"], "ended with status 3", marks=pytest.mark.slow)


@pytest.mark.parametrize("agent", [one_question, one_question_in_a_thread, A_COMMAND])
@pytest.mark.parametrize(("says", "reward"), [("5", 1.0), ("6", 0.0)])
def test_what_an_agent_returns_is_the_reward_of_what_was_sampled(tmp_path, agent, says, reward):
    played = play(tmp_path, agent, says=[says])
    (row,) = played.rows
    ((context, done),) = played.engine.asked
    assert (row.group, row.episode, row.reward, row.finish_reason) == (3, 1, reward, "stop")
    assert [*row.token_ids] == context + done.token_ids
    assert [*row.mask] == [False] * len(context) + [True] * len(done.token_ids)
    assert played.counts == {"agent/requests": 1.0}


async def raises(ctx):
    await one_question(ctx)
    raise KeyError("a bug of the agent")


async def asks_nothing(ctx):
    return 1.0


async def returns_text(ctx):
    await one_question(ctx)
    return "good"


async def returns_nan(ctx):
    await one_question(ctx)
    return float("nan")


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        (raises, "the agent raised KeyError: 'a bug of the agent'"),
        (asks_nothing, "without a reply of the policy, so there is nothing to train on"),
        (returns_text, "returned a reward that is 'good'"),
        (returns_nan, "returned a reward that is nan"),
        A_CRASH,
        (["/no/such/program"], "the agent raised FileNotFoundError"),
        ([sys.executable, "-I", "-S", "-c", "print('well')"], "printed 'well' as its last line: print the reward"),
    ],
)
def test_an_error_of_the_agent_is_no_reward(tmp_path, agent, message):
    with pytest.raises(EnvError, match=message) as raised:
        play(tmp_path, agent)
    assert not isinstance(raised.value, EnvLate)


async def talks_on(ctx):
    client = openai.AsyncOpenAI(base_url=ctx.base_url, api_key=ctx.api_key, max_retries=0)
    messages = list(ctx.messages)
    while True:
        reply = await client.chat.completions.create(model=ctx.model, messages=messages)
        said = {"role": "assistant", "content": reply.choices[0].message.content}
        messages += [said, {"role": "user", "content": "more"}]


async def scores_itself_at_the_limit(ctx):
    try:
        await talks_on(ctx)
    except openai.BadRequestError as error:
        return 0.5 if error.param == "limits.turns" else 0.0


def test_an_agent_that_meets_a_limit_has_ended_by_it_and_may_score_itself(tmp_path):
    (row,) = play(tmp_path, talks_on, says=()).rows
    assert (row.reward, row.finish_reason, row.trained) == (0.0, "length", True)
    (row,) = play(tmp_path, scores_itself_at_the_limit, says=()).rows
    assert (row.reward, row.finish_reason) == (0.5, "length")
    assert max(row.turns) == 3
    assert not play(tmp_path, talks_on, says=(), mask_truncated=True).rows[0].trained


async def not_for_this_one(ctx):
    await one_question(ctx)
    return NOT_APPLICABLE


def test_a_reward_that_does_not_apply_gives_no_rows(tmp_path):
    assert play(tmp_path, not_for_this_one).rows == []


def test_an_episode_whose_time_is_over_is_played_again_and_its_requests_end(tmp_path):
    def never(engine):
        engine.gate = asyncio.Event()

    with pytest.raises(EnvLate, match=r"limits\.seconds=0\.2 were over while the agent ran"):
        play(tmp_path, one_question, prepare=never, limits=Limits(seconds=0.2))


def test_a_lost_engine_is_no_error_of_the_agent(tmp_path):
    def lose(engine):
        engine.lost = True

    with pytest.raises(EngineLost, match="its process has ended"):
        play(tmp_path, one_question, prepare=lose)


def test_a_cancelled_episode_ends_its_requests(tmp_path):
    async def main():
        served, engine = endpoint(tmp_path)
        engine.gate = asyncio.Event()
        await served.start()
        host = ThreadHost(env=partial(Hosted, one_question))
        stage = Stage(host=host, endpoints=Local(served), limits=Limits(), model="tiny")
        playing = asyncio.create_task(play_agent(stage, PROMPT, 0, 0, None))
        while not engine.running:
            await asyncio.sleep(0)
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)
        assert not served.episodes
        assert not engine.running
        await served.close()

    asyncio.run(main())


def test_an_evaluation_has_its_own_temperature(tmp_path):
    async def main():
        served, engine = endpoint(tmp_path, says=["5"])
        await served.start()
        host = ThreadHost(env=partial(Hosted, one_question))
        stage = Stage(host=host, endpoints=Local(served), limits=Limits(), model="tiny")
        await play_agent(replace(stage), PROMPT, 0, 0, 0.25)
        await served.close()
        return engine.temperatures

    assert asyncio.run(main()) == [0.25]
