"""A judge returns a score or an error: retries, deadlines, the cache and its bound, and no key in any message."""

import asyncio
import json
import math
import pickle
import time
from dataclasses import replace
from email.utils import formatdate
from threading import Event

import pytest

from judge_server import completion, judge_server
from rl.config import Config
from rl.judges import Calls, JudgeError, Labelled, OpenAIJudge, Preference, RewardModel, agreement, desk, number_after
from rl.judges.chat import as_text, retry_after
from rl.judges.desk import TryAgain, asked, judge_metrics
from rl.judges.hearing import hear
from rl.judges.reward_model import connect
from rl.rewards.score import RewardError, score_in_time
from rl.types import Data, Reply, Verdict
from rl.validate import check
from trainer.flags import override
from trainer.runs.settings import resolved

KEY = "sk-very-secret-0123456789"


# To check the types of every call takes half of the time, and an int is a number too.
pytestmark = pytest.mark.usefixtures("unchecked_types")


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The waits between tries, which take no time."""
    seconds = []

    async def wait(s):
        seconds.append(s)
        await asyncio.sleep(0)

    monkeypatch.setattr(desk, "sleep", wait)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return seconds


def at(server, **settings):
    given = {"model": "m", "prompt": "Rate {reply} as an answer to {prompt}", "parse": number_after("Score:", 0, 10)}
    return OpenAIJudge(url=server.url, **given | settings)


def ask(judge, reply="4", prompt="2+2?"):
    return asyncio.run(judge(prompt, reply))


class Kind:
    """A judge without a server: `answer(number of the try)` is what a try comes to."""

    label, shown = "kind", "'kind' (a fake)"

    def __init__(self, answer, repeatable=True, **calls):
        self.answer, self.repeatable, self.calls = answer, repeatable, Calls(**calls)
        self.asked = self.now = self.most = 0

    async def ask(self, prompt, reply):
        self.asked += 1
        number = self.asked
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            for _ in range(20):
                await asyncio.sleep(0)
            score = self.answer(number)
            score = await score if asyncio.iscoroutine(score) else score
        finally:
            self.now -= 1
        return Verdict(judge=self.label, reply=reply, score=score, raw=f"raw {score}")

    async def __call__(self, prompt, reply):
        return await asked(self, prompt, reply)


def failing(*errors, then=1.0):
    """Raises the errors one after the other, and then returns a score."""

    def answer(number):
        if number <= len(errors):
            raise errors[number - 1]
        return then

    return answer


async def hanging():
    await asyncio.Event().wait()


# -- one question ------------------------------------------------------------------------------------------------------


def test_a_judge_behind_a_url_gets_prompt_and_reply_and_its_number_is_the_score():
    with judge_server(lambda body, n: "Right. Score: 7/10") as server:
        judge = at(server, body={"max_tokens": 9})
        # A reply cannot insert the prompt a second time.
        assert ask(judge, reply="{prompt}", prompt=[{"role": "user", "content": "2+2?"}]) == 7.0
        assert server.headers["Authorization"] == f"Bearer {KEY}"
    (body,) = server.requests
    assert body == {
        "model": "m",
        "temperature": 0.0,
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "Rate {prompt} as an answer to 2+2?"}],
    }


def test_a_function_may_write_the_messages():
    with judge_server(lambda body, n: "Score: 1") as server:
        ask(at(server, prompt=lambda prompt, reply: [{"role": "system", "content": f"{prompt}|{reply}"}]), "b", "a")
    assert server.requests[0]["messages"] == [{"role": "system", "content": "a|b"}]


def test_a_conversation_is_text_with_roles():
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2+2?"}]
    assert as_text(turns) == "system: Be short.\n\nuser: 2+2?"
    with pytest.raises(JudgeError, match="token ids"):
        as_text([1, 2])


@pytest.mark.parametrize(
    ("verdict", "score"),
    [
        ("Score: 7/10", 7.0),
        ("**Score:** 8.5", 8.5),
        ("score: 3, no, Score: 4", 4.0),
        ("Score: 11", None),
        ("Score: -1", None),
        ("Score: seven", None),
        ("7", None),
    ],
)
def test_the_number_after_the_last_words_counts_within_its_range(verdict, score):
    assert number_after("Score:", 0, 10)(verdict) == score


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [(429, {}, "slow down"), (503, {}, ""), (408, {}, ""), "<close>", "no number", (200, {}, "{"), (200, {}, "[]")],
    ids=["429", "503", "408", "close", "unreadable", "no JSON", "no completion"],
)
def test_what_may_pass_is_tried_again(first, waits):
    with judge_server(lambda body, n: first if n < 2 else "Score: 3") as server:
        judge = at(server)
        assert ask(judge) == 3.0
        assert len(server.requests) == 3
    assert 0.25 <= waits[0] <= 0.5 <= waits[1] <= 1.0


def test_a_wait_is_at_least_what_the_server_asks_for(waits):
    busy = (429, {"Retry-After": "7"}, "")
    with judge_server(lambda body, n: "Score: 3" if n else busy) as server:
        assert ask(at(server)) == 3.0
    assert 7.0 < waits[0] < 8.0


def test_a_server_that_asks_for_more_time_than_is_left_is_an_error_at_once(waits):
    with judge_server(lambda body, n: (429, {"Retry-After": "400"}, "")) as server:
        with pytest.raises(JudgeError, match=r"'m' \(m at http.*failed 1 times .*calls.seconds=300.*HTTP 429"):
            ask(at(server))
    assert (len(server.requests), waits) == (1, [])


def test_retry_after_may_be_a_date():
    assert 50 < retry_after({"retry-after": formatdate(time.time() + 60, usegmt=True)}) <= 60
    assert retry_after({"retry-after": "soon"}) == retry_after({}) == retry_after({"retry-after": "-3"}) == 0.0


@pytest.mark.parametrize(
    ("parse", "why"),
    [
        (lambda raw: None, "found no score in"),
        (lambda raw: float("nan"), "found no score in"),
        (lambda raw: {}["score"], r"raised KeyError \(.*score.*\) for"),
        (lambda raw: float(raw + KEY), r"raised ValueError \(.*convert string to float.*\*\*\*.*\) for"),
    ],
)
def test_a_verdict_that_cannot_be_read_is_an_error_after_its_tries_and_is_not_kept(parse, why):
    with judge_server(lambda body, n: "I like it") as server:
        judge = at(server, parse=parse, calls=Calls(tries=3))
        for rounds in (1, 2):
            with pytest.raises(JudgeError, match=rf"failed 3 times.*`parse` {why} the verdict 'I like it'"):
                ask(judge)
            assert len(server.requests) == 3 * rounds


def test_a_verdict_that_a_limit_cut_off_is_not_read():
    cut = (200, {}, completion("Score: 1", "length"))
    with judge_server(lambda body, n: "Score: 10" if n else cut) as server:
        assert ask(at(server)) == 10.0


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_request_that_is_refused_is_not_repeated_and_the_key_is_in_no_message(status):
    with judge_server(lambda body, n: (status, {}, f"key {KEY} is bad")) as server:
        with pytest.raises(JudgeError, match=rf"HTTP {status}: 'key \*\*\* is bad") as caught:
            ask(at(server))
    assert len(server.requests) == 1
    assert ("OPENAI_API_KEY" in str(caught.value)) == (status in (401, 403))


@pytest.mark.parametrize("answer", [(500, {}, KEY), (200, {}, KEY), f"no score, {KEY}", (200, {}, f'["{KEY}"]')])
def test_no_answer_brings_the_key_into_a_message(answer):
    with judge_server(lambda body, n: answer) as server:
        with pytest.raises(JudgeError) as caught:
            ask(at(server, calls=Calls(tries=2)))
    error = caught.value
    while error is not None:
        assert KEY not in f"{error!r}"
        error = error.__cause__ or error.__context__


def test_a_key_that_cannot_be_sent_is_in_no_message(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nx")
    with judge_server(lambda body, n: "Score: 3") as server:
        with pytest.raises(JudgeError, match="OPENAI_API_KEY holds characters") as caught:
            ask(at(server))
    assert KEY not in f"{caught.value!r}"


def test_a_server_that_is_down_is_named():
    with judge_server(lambda body, n: "Score: 3") as server:
        pass
    with pytest.raises(JudgeError, match=rf"the judge 'helpful' \(m at {server.url}\) failed 5 times.*ConnectError"):
        ask(at(server, name="helpful"))


def test_a_try_that_hangs_ends_and_the_next_one_counts():
    judge = Kind(lambda number: hanging() if number == 1 else 2.0, try_s=0.05)
    assert ask(judge) == 2.0
    never = Kind(lambda number: hanging(), try_s=0.01, tries=3)
    with pytest.raises(JudgeError, match=r"failed 3 times.*no answer within 0\.01 s"):
        ask(never)
    assert never.asked == 3


def test_a_call_ends_at_its_deadline_however_many_tries_are_left():
    judge = Kind(lambda number: hanging(), try_s=60.0, seconds=0.05, tries=1000)
    with pytest.raises(JudgeError, match=r"failed 1 times .*calls.seconds=0\.05\)"):
        ask(judge)
    assert judge.asked == 1


def test_an_error_that_no_try_can_mend_is_raised_at_once():
    judge = Kind(failing(JudgeError("the judge is wrong")))
    with pytest.raises(JudgeError, match="wrong"):
        ask(judge)
    assert ask(judge) == 1.0


# -- many questions ----------------------------------------------------------------------------------------------------


def together(judge, replies):
    async def all_of_them():
        return await asyncio.gather(*(judge("p", reply) for reply in replies))

    return asyncio.run(all_of_them())


def when_full(bound):
    """A judge whose calls end once `bound` of them have run at the same time, in whatever event loops."""
    full = Event()

    async def answer(number):
        if judge.now == bound:
            full.set()
        while not full.is_set():
            await asyncio.sleep(0.001)
        return 1.0

    judge = Kind(answer, concurrency=bound)  # `answer` looks at it
    return judge


@pytest.mark.parametrize("bound", [1, 3])
def test_no_more_calls_than_the_bound_run_at_a_time(bound):
    judge = when_full(bound)
    together(judge, range(12))
    assert (judge.asked, judge.most) == (12, bound)


def test_the_bound_holds_for_all_event_loops_together():
    judge = when_full(2)

    async def from_two_loops():
        await asyncio.gather(*(asyncio.to_thread(together, judge, [f"{i} {j}" for j in range(4)]) for i in range(2)))

    asyncio.run(from_two_loops())
    assert (judge.asked, judge.most) == (8, 2)


def test_a_question_is_asked_once_at_whatever_time():
    judge = Kind(float)
    assert together(judge, ["a", "a", "b", "a"]) == [1.0, 1.0, 2.0, 1.0]
    assert ask(judge, "a", "p") == 1.0
    assert ask(judge, "a", "another prompt") == 3.0
    assert judge.asked == 3


def test_nothing_is_kept_above_temperature_0():
    judge = Kind(float, repeatable=False)
    assert sorted(together(judge, ["a", "a", "a"])) == [1.0, 2.0, 3.0]
    settings = {"url": "http://x/v1", "model": "m", "prompt": "{reply}", "parse": float}
    assert OpenAIJudge(**settings).repeatable
    assert not OpenAIJudge(**settings, temperature=0.7).repeatable
    assert not OpenAIJudge(**settings, body={"temperature": 1}).repeatable


def test_the_cache_has_a_bound(monkeypatch):
    monkeypatch.setattr(desk, "MOST_KNOWN", 2)
    judge = Kind(float)
    for reply in "abcab":
        ask(judge, reply)
    assert judge.asked == 5
    ask(judge, "b")
    assert judge.asked == 5


def test_who_gives_up_an_answer_takes_it_from_nobody_else():
    judge = Kind(float)

    async def first_gives_up():
        first, second = (asyncio.ensure_future(judge("p", "a")) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert asyncio.run(first_gives_up()) == 1.0
    assert judge.asked == 1


def test_metrics_count_from_one_step_to_the_next():
    judge = Kind(failing(TryAgain("busy"), TryAgain("busy"), then=1.0))
    assert judge_metrics([judge]) == {}
    together(judge, ["a", "a"])
    seconds = (metrics := judge_metrics([judge])).pop("judge/kind/seconds")
    assert seconds >= 0
    assert metrics == {
        "judge/kind/calls": 2.0,
        "judge/kind/cached_frac": 0.5,
        "judge/kind/failed": 0.0,
        "judge/kind/tries": 3.0,
    }
    assert judge_metrics([judge]) == {}


# -- in a reward -------------------------------------------------------------------------------------------------------

REPLY = Reply(text="4", finished=True, task={}, token_ids=[1])


def scored(judge, deadline_s=60.0):
    async def reward(reply):
        return await judge("p", reply.text)

    return asyncio.run(score_in_time(reward, REPLY, 0, deadline_s))


def test_an_error_of_a_judge_is_not_an_error_of_the_reward():
    with pytest.raises(JudgeError, match="'kind'"):
        scored(Kind(failing(TryAgain("busy")), tries=1))


def test_a_reward_has_time_while_it_waits_for_a_judge_and_no_longer():
    deadline = 0.05

    async def past_the_deadline():
        end = time.monotonic() + 2 * deadline
        while time.monotonic() < end:
            await asyncio.sleep(0)
        return 1.0

    assert scored(Kind(lambda number: past_the_deadline()), deadline) == (1.0, {})

    async def hangs_later(reply):
        await Kind(float)("p", reply.text)
        await hanging()

    with pytest.raises(RewardError, match=r"longer than 0\.05 s"):
        asyncio.run(score_in_time(hangs_later, REPLY, 0, deadline))


def test_the_verdicts_of_a_reward_are_heard_where_it_was_called():
    async def listening():
        with hear() as heard:
            await score_in_time(reward, REPLY, 0, 5.0)
        return heard.verdicts

    async def reward(reply):
        return sum(await asyncio.gather(judge("p", reply.text), judge("p", "other")))

    judge = Kind(float)
    assert [(v.reply, v.raw) for v in asyncio.run(listening())] == [("4", "raw 1.0"), ("other", "raw 2.0")]


def test_a_reward_model_is_connected_by_the_run_and_a_rehearsal_needs_none():
    judge = RewardModel(model="models/mine")
    with pytest.raises(JudgeError, match=r"'mine'.*judges=\(judge,\)"):
        ask(judge)
    with hear(rehearsal=True):
        assert scored(judge) == (0.0, {})

    async def engine(prompt, reply):
        if reply == "lost":
            raise JudgeError("has lost its process")
        return float(len(reply))

    connect(judge, engine)
    assert ask(judge, "four") == 4.0
    with pytest.raises(JudgeError, match=r"the judge 'mine' \(reward model models/mine\) has lost its process"):
        ask(judge, "lost")


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000/v1"}, "must begin with http"),
        ({"url": f"http://me:{KEY}@x/v1"}, "environment variable OPENAI_API_KEY"),
        ({"url": f"http://x/v1?key={KEY}"}, "environment variable OPENAI_API_KEY"),
        ({"prompt": "Is it right?"}, r"no \{reply\}"),
    ],
)
def test_settings_that_cannot_work_are_refused_without_showing_a_key(settings, message):
    given = {"url": "http://x/v1", "model": "m", "prompt": "{reply}", "parse": float}
    with pytest.raises(ValueError, match=message) as caught:
        OpenAIJudge(**given | settings)
    assert KEY not in str(caught.value)


def config_with(*judges, **settings):
    return Config(name="t", model="m", data=Data(train=[]), reward=len, judges=judges, **settings)


def test_judges_are_settings_that_travel_and_are_written_down_without_a_key():
    judge = OpenAIJudge(url="http://x/v1", model="a/m", prompt="{reply}", parse=number_after("Score:", 0, 10))
    written = json.dumps(resolved(config_with(judge, RewardModel(model="b/r"))))
    assert '"url": "http://x/v1"' in written
    assert '"high": 10' in written
    assert KEY not in written
    assert pickle.loads(pickle.dumps(judge)).label == judge.label == "m"


def test_flags_leave_the_judges_that_rewards_await():
    judges = (RewardModel(model="a/r"), OpenAIJudge(url="http://x/v1", model="m", prompt="{reply}", parse=float))
    config = override(config_with(*judges), ["--steps", "3"])
    assert config.steps == 3
    assert all(kept is judge for kept, judge in zip(config.judges, judges, strict=True))


def test_judges_of_a_run_have_different_names_and_live_on_the_driver():
    one = RewardModel(model="a/r")
    check(config_with(one, replace(one, name="other")))
    with pytest.raises(ValueError, match=r"two judges have the name 'r'.*name="):
        check(config_with(one, RewardModel(model="b/r")))
    with pytest.raises(ValueError, match=r"is one judge: write a tuple, judges=\(judge,\)"):
        Config(name="t", model="m", data=Data(train=[]), reward=len, judges=one)


# -- agreement ---------------------------------------------------------------------------------------------------------


async def by_length(prompt, reply):
    return float(len(reply))


def test_agreement_with_preferences_is_an_accuracy_with_its_error():
    pairs = [("long", "s"), ("same", "same"), ("s", "long"), ("long", "s")]
    cases = [Preference(prompt="p", chosen=chosen, rejected=rejected) for chosen, rejected in pairs]
    found = asyncio.run(agreement(by_length, cases))
    # 1, 1/2, 0, 1: mean 5/8, standard deviation sqrt(11/48).
    assert found == pytest.approx({"accuracy": 0.625, "accuracy_se": math.sqrt(11 / 48) / 2})


def test_agreement_with_scores_is_exact_hits_and_a_correlation():
    cases = [Labelled(prompt="p", reply="x" * n, label=label) for n, label in ((1, 1.0), (2, 2.0), (3, 2.0), (4, 4.0))]
    found = asyncio.run(agreement(by_length, cases))
    # Pearson's r of (1, 2, 3, 4) and (1, 2, 2, 4): 4.5 / sqrt(5 * 4.75).
    r = 4.5 / math.sqrt(5 * 4.75)
    assert found["correlation"] == pytest.approx(r)
    assert found["correlation_se"] == pytest.approx((1 - r * r) / math.sqrt(3))
    assert found["exact"] == 0.75
    same = [Labelled(prompt="p", reply="x", label=1.0)] * 2
    assert math.isnan(asyncio.run(agreement(by_length, same))["correlation"])


@pytest.mark.parametrize(
    "cases", [[], [Labelled(prompt="", reply="", label=0.0), Preference(prompt="", chosen="", rejected="")]]
)
def test_agreement_needs_cases_of_one_kind(cases):
    with pytest.raises(ValueError, match="cases"):
        asyncio.run(agreement(by_length, cases))
