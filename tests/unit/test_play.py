"""One episode: the order of a turn, what the policy reads, which limit ends it, and whose error is whose."""

import asyncio
import json
import math
import threading
import time
from functools import partial

import pytest

from episodes import Calculator, Chat, Engine, InlineHost, prompt, solves, stage, text
from orders import run_seeded
from rl.environments.group import play_group
from rl.environments.host import ThreadHost
from rl.environments.play import play
from rl.environments.threads import Threads
from rl.environments.types import EnvError, EnvLate, Limits, Step, ToolError
from rl.loop.stream import turn_seed
from rl.protocols import EngineLost
from rl.rewards.result import NOT_APPLICABLE
from rl.types import Call, Completion, Parsed

SEEDS = partial(turn_seed, 0, 0, 0)
PROMPT = "[user]2*3+4[assistant]"


# To check the types of every call takes half of the time.
pytestmark = pytest.mark.usefixtures("unchecked_types")


def played(says=solves, env=Calculator, *, on=None, **settings):
    """The rows of one episode, and what the engine was asked."""
    engine = says if isinstance(says, Engine) else Engine(says)
    rows = asyncio.run(play(stage(engine, env=env, **settings), on or prompt(), 0, SEEDS))
    return rows, engine.asked


def says(*turns):
    """A policy that says these texts, one per turn."""
    return lambda before, r: turns[before.count("[assistant]") - 1]


def seen(env, says=solves, **settings):
    """The episode as the reward sees it."""
    found = []

    class Seeing(env):
        def reward(self, episode):
            found.append(episode)
            return super().reward(episode) if hasattr(env, "reward") else 0.0

    played(says, Seeing, **settings)
    return found[0]


def test_an_episode_is_one_row_that_the_engine_was_asked():
    (row,), asked = played()
    assert text(row.token_ids) == PROMPT + "CALC(2*3)[user]6[assistant]CALC(6+4)[user]10[assistant]10"
    assert [*row.token_ids] == asked[-1]["context"] + asked[-1]["completion"].token_ids
    assert "".join(chr(t) for t, m in zip(row.token_ids, row.mask, strict=True) if m) == "CALC(2*3)CALC(6+4)10"
    assert (row.reward, row.finish_reason, row.paid, row.trained) == (1.0, "stop", None, True)
    assert [t for t in row.turns if t >= 0] == [0] * 9 + [1] * 9 + [2] * 2


def test_turns_have_their_own_seeds_one_engine_and_the_tokens_that_are_left():
    _, asked = played(limits=Limits(tokens=24), max_tokens=20)
    assert [each["seed"] for each in asked] == [turn_seed(0, 0, 0, turn) for turn in range(3)]
    assert len({each["seed"] for each in asked}) == 3
    assert [each["engine"] for each in asked] == [None, 3, 3]
    assert [each["max_tokens"] for each in asked] == [20, 15, 6]


def test_the_first_turn_of_a_member_has_the_seed_of_a_single_reply():
    assert turn_seed(4, 7, 3, 0) == turn_seed(4, 7, 0, 0) + 3


def test_the_reward_sees_turns_calls_results_and_messages():
    episode = seen(Calculator)
    assert [turn.text for turn in episode.turns] == ["CALC(2*3)", "CALC(6+4)", "10"]
    assert episode.turns[0].calls == (Call(name="multiply", arguments={"a": 2, "b": 3}),)
    assert [turn.results for turn in episode.turns] == [("6",), ("10",), ()]
    assert (episode.ended, episode.text, episode.task) == ("done", "10", {"answer": "10"})
    assert [m["content"] for m in episode.messages] == ["2*3+4", "CALC(2*3)", "6", "CALC(6+4)", "10", "10"]


@pytest.mark.parametrize(
    ("says", "settings", "ended"),
    [
        (solves, {"limits": Limits(turns=2)}, "turns"),
        (solves, {"max_tokens": 5}, "length"),
        (solves, {"limits": Limits(tokens=12)}, "length"),
        (solves, {"limits": Limits(tokens=9)}, "length"),
        (solves, {"max_model_len": len(PROMPT) + 9 + 12}, "length"),
    ],
)
def test_a_limit_ends_an_episode_which_is_scored_as_it_stands(says, settings, ended):
    episode = seen(Calculator, says, **settings)
    assert episode.ended == ended
    (row,), _ = played(says, **settings)
    assert (row.finish_reason, row.reward) == ("length", 0.0)
    (row,), _ = played(says, mask_truncated=True, **settings)
    assert not row.trained


def test_a_turn_that_was_cut_off_has_its_calls_not_made():
    native = Engine(
        says("CALC(2*3)", "10"), lambda text: Parsed(text=text, calls=(Call(name="multiply", arguments={}),))
    )
    assert seen(Calculator, native, max_tokens=9, limits=Limits(turns=1)).turns[0].results
    turn = seen(Calculator, native, max_tokens=8).turns[0]
    assert (turn.finished, turn.calls, turn.results) == (False, (), ())


def test_calls_of_the_last_turn_are_made_because_they_may_change_what_the_reward_sees():
    assert seen(Calculator, limits=Limits(turns=1)).turns[0].results == ("6",)


@pytest.mark.parametrize(
    ("first", "reads"),
    [
        ("CALC(2*)", "The call was not understood: CALC(2*) is no calculation"),
        ("BAD", "needs the argument"),
        ("UNKNOWN", "there is no tool 'divide'"),
        ("RAISES", "the box is locked"),
    ],
)
def test_what_the_policy_does_wrong_is_something_that_it_reads(first, reads):
    class Box(Calculator):
        def open(self) -> str:
            """Open the box."""
            raise ToolError("the box is locked")

        def parse(self, text):
            made = {"BAD": ("multiply", {"a": 2}), "UNKNOWN": ("divide", {}), "RAISES": ("open", {})}
            return Call(name=made[text][0], arguments=made[text][1]) if text in made else super().parse(text)

    episode = seen(Box, says(first, "10"))
    assert reads in episode.messages[2]["content"]
    assert (episode.ended, episode.text) == ("done", "10")


def test_native_calls_come_from_the_engine_and_their_results_are_messages_of_the_tool():
    def parses(text):
        if text == "broken":
            return Parsed(text="", malformed="no JSON")
        calls = (
            (Call(name="multiply", arguments={"a": 2, "b": 3}, id="x"), Call(name="add", arguments={"a": 1, "b": 1}))
            if text == "both"
            else ()
        )
        return Parsed(text=text.strip("<>"), reasoning="hm", calls=calls)

    class Native(Calculator):
        parse = None

    episode = seen(Native, Engine(says("broken", "both", "<10>"), parses))
    assert episode.messages[2] == {"role": "user", "content": "The call was not understood: no JSON"}
    assert episode.messages[3]["tool_calls"][0]["function"] == {"name": "multiply", "arguments": {"a": 2, "b": 3}}
    assert episode.messages[4:6] == [
        {"role": "tool", "name": "multiply", "tool_call_id": "x", "content": "6"},
        {"role": "tool", "name": "add", "tool_call_id": "", "content": "2"},
    ]
    assert (episode.text, episode.turns[-1].reasoning) == ("10", "hm")


class Game:
    """Guess a number; each turn is paid."""

    def __init__(self, task):
        self.tries = 0

    def start(self):
        return "Guess!"

    async def reply(self, turn):
        self.tries += 1
        if not turn.text.isdigit():
            raise ToolError("a number, please")
        done = turn.text == "7"
        return Step(observation="higher", reward=0.0 if done else -0.25, done=done)

    def reward(self, episode):
        return {"won": float(episode.text == "7"), "tries": -0.01 * self.tries}


def test_a_game_answers_each_turn_and_pays_it():
    (row,), asked = played(says("3", "what", "7"), Game)
    start = "[user]2*3+4[user]Guess![assistant]"
    assert text(row.token_ids) == start + "3[user]higher[assistant]what[user]a number, please[assistant]7"
    assert row.reward_parts == {"won": 1.0, "tries": -0.03, "turns": -0.25}
    assert row.reward == pytest.approx(0.72)
    first, last = len(start), len(row.token_ids) - 1
    assert [at for at, _ in row.paid] == [first, last]
    assert [amount for _, amount in row.paid] == pytest.approx([-0.25, 0.97])
    assert asked[0]["context"] == [ord(each) for each in start]
    assert row.finish_reason == "stop"


def test_a_reward_that_does_not_apply_leaves_the_episode_out():
    class Cannot(Calculator):
        def reward(self, episode):
            return NOT_APPLICABLE

    assert played(env=Cannot)[0] == []


def boom(*_, **__):
    raise KeyError("database")


def returns(value):
    return lambda *_, **__: value


@pytest.mark.parametrize(
    ("method", "does", "error"),
    [
        ("__init__", boom, "the environment's constructor raised KeyError: 'database'"),
        ("start", boom, "`start` raised KeyError"),
        ("start", returns(3), "`start` returned 3"),
        ("parse", boom, "`parse` raised KeyError"),
        ("parse", returns("CALC"), "`parse` returned 'CALC': return a list of Call"),
        ("_multiply", boom, "the tool multiply raised KeyError"),
        ("_multiply", returns(object()), "the tool multiply returned <object>"),
        ("_multiply", returns(b"\xff"), "the tool multiply returned b'"),
        ("reply", boom, "`reply` raised KeyError"),
        ("reply", returns("higher"), "`reply` returned 'higher': return Step"),
        ("reply", lambda *_, **__: Step(reward=math.nan), "the reward nan, which is not finite"),
        ("reward", boom, "`reward` raised KeyError"),
        ("reward", returns(math.nan), "`reward` returned a value that is nan"),
        ("reward", returns(None), "`reward` returned a value that is None"),
        ("close", boom, "`close` raised KeyError"),
    ],
)
def test_everything_else_that_the_environment_raises_or_returns_is_its_own_error(method, does, error):
    class Faulty(Calculator):
        def __init__(self, task):
            super().__init__(task)

        def multiply(self, a: int, b: int) -> int:
            """Multiply two integers."""
            return self._multiply(a, b)

        def _multiply(self, a, b):
            return a * b

    setattr(Faulty, method, does)
    with pytest.raises(EnvError, match=error.replace("[", r"\[")):
        played(env=Faulty)


@pytest.mark.parametrize("error", [SystemExit(1), asyncio.CancelledError(), StopIteration(), KeyboardInterrupt()])
@pytest.mark.parametrize("tool", ["multiply", "add"])
def test_an_exit_or_a_cancellation_in_a_tool_ends_neither_run_nor_episode_silently(tool, error):
    class Exits(Calculator):
        pass

    def sync(self, a: int, b: int) -> int:
        raise error

    async def later(self, a: int, b: int) -> int:
        raise error

    setattr(Exits, tool, sync if tool == "multiply" else later)
    if tool == "add" and isinstance(error, SystemExit | KeyboardInterrupt):
        pytest.skip("asyncio lets these end its event loop")
    with pytest.raises(EnvError, match=f"the tool {tool} "):
        played(env=Exits)


def test_the_environment_is_closed_in_every_case():
    closed = []

    class Closed(Calculator):
        async def close(self):
            closed.append(self)

        def reward(self, episode):
            return boom() if episode.task["answer"] == "raise" else 1.0

    played(env=Closed)
    with pytest.raises(EnvError, match="`reward` raised"):
        played(env=Closed, on=prompt(answer="raise"))

    async def cancelled():
        waiting = asyncio.Event()

        class Hangs(Engine):
            async def sample(self, *_, **__):
                waiting.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(play(stage(Hangs(solves), env=Closed), prompt(), 0, SEEDS))
        await waiting.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(cancelled())
    assert len(closed) == 3


class Gate:
    """Where a method hangs until the test ends."""

    def __init__(self):
        self.event = threading.Event()

    def hang(self, *_, **__):
        self.event.wait(20)


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.event.set()


async def forever(*_, **__):
    await asyncio.Event().wait()


def timed(env, engine, limits):
    """The rows of an episode on a clock that jumps."""
    found = []

    async def main():
        one = stage(engine, InlineHost(env), limits=limits)
        found.append(await play(one, prompt(), 0, SEEDS))

    run_seeded(main(), 0)
    return found[0]


def test_a_tool_that_hangs_when_the_time_is_over_ends_the_episode_which_is_scored():
    class Hangs(Calculator):
        async def multiply(self, a: int, b: int) -> int:
            """Multiply two integers."""
            await forever()

        def reward(self, episode):
            assert episode.ended == "deadline"
            assert (episode.text, episode.turns[0].results) == ("CALC(2*3)", ())
            return 0.5

    (row,) = timed(Hangs, Engine(solves), Limits(seconds=20.0))
    assert (row.reward, row.finish_reason) == (0.5, "length")


@pytest.mark.parametrize("method", ["start", "parse", "reply"])
def test_time_that_is_over_elsewhere_is_an_error_and_no_reward(method):
    env = type("Hangs", (Calculator,), {method: forever})
    with pytest.raises(EnvLate, match=f"were over while the episode waited for `{method}`"):
        timed(env, Engine(solves), Limits(seconds=20.0))


def test_time_that_is_over_while_the_engine_samples_is_an_error_and_no_reward():
    engine = Engine(solves)
    engine.sample = forever
    with pytest.raises(EnvLate, match="waited for the engine"):
        timed(Calculator, engine, Limits(seconds=20.0))


@pytest.mark.parametrize("method", ["__init__", "start", "parse", "multiply", "add", "reply", "reward", "close"])
def test_a_call_that_takes_too_long_is_an_error_of_the_environment(gate, method):
    async def later(self, a: int, b: int) -> int:
        await asyncio.Event().wait()

    def tool(self, a: int, b: int) -> int:
        gate.hang()

    hangs = {"add": later, "multiply": tool}.get(method, gate.hang)
    env = type("Hangs", (Calculator,), {method: hangs})
    with pytest.raises(EnvLate, match=r"took longer than 0\.05 s"):
        played(env=env, limits=Limits(tool_s=0.05), reward_s=0.05)


def test_an_observation_that_does_not_fit_ends_the_episode_and_a_huge_one_is_not_even_encoded():
    class Long(Calculator):
        def multiply(self, a: int, b: int) -> str:
            """Multiply two integers."""
            return "x" * a

    class Counting(Chat):
        encoded = 0

        def delta(self, messages, after):
            Counting.encoded += 1
            return [0] * len(messages[0]["content"])

    for size, times in ((5000, 1), (3_000_000, 0)):
        Counting.encoded = 0
        setting = stage(Engine(says(f"CALC({size}*1)", "x")), env=Long)
        setting = type(setting)(**{**setting.__dict__, "chat": Counting()})
        (row,) = asyncio.run(play(setting, prompt(), 0, SEEDS))
        assert (row.finish_reason, row.mask[-1], Counting.encoded) == ("length", True, times)


def test_a_template_that_raises_is_an_error_that_names_the_observation():
    class Strict(Chat):
        def delta(self, messages, after):
            raise ValueError("roles must alternate")

    setting = stage(Engine(solves))
    setting = type(setting)(**{**setting.__dict__, "chat": Strict()})
    with pytest.raises(EnvError, match="the chat template, given an observation, raised ValueError: roles must"):
        asyncio.run(play(setting, prompt(), 0, SEEDS))


def test_a_failed_episode_is_played_again_with_a_new_environment_and_the_same_seeds():
    made = []

    class Flaky(Calculator):
        def __init__(self, task):
            super().__init__(task)
            made.append(self)
            if len(made) == 2:
                self.parse = boom

    engine = Engine(solves)
    one = stage(engine, env=Flaky)
    group = asyncio.run(play_group(1, lambda i: play(one, prompt(), i, SEEDS), 2))
    assert (len(group.rows), group.failed, group.replayed, len(made)) == (1, "", 0, 1)
    group = asyncio.run(play_group(1, lambda i: play(one, prompt(), i, SEEDS), 2))
    assert (len(group.rows), group.failed, group.replayed, len(made)) == (1, "", 1, 3)
    seeds = [each["seed"] for each in engine.asked]
    assert seeds[3:] == [SEEDS(0), SEEDS(0), SEEDS(1), SEEDS(2)]


@pytest.mark.parametrize(
    ("error", "failed"),
    [(EnvError("x"), "env_error"), (EnvLate("x"), "deadline"), (EngineLost("x"), "engine_lost")],
)
def test_a_group_fails_with_its_reason_when_no_retry_is_left(error, failed):
    calls = []

    async def plays(index):
        calls.append(index)
        if index == 1:
            raise error
        await asyncio.Event().wait()

    group = asyncio.run(play_group(3, plays, 2))
    assert (group.rows, group.samples, group.failed, group.error) == ([], 3, failed, error)
    assert calls.count(1) == 3


def test_an_aborted_completion_is_no_turn():
    class Aborts(Engine):
        async def sample(self, *_, **__):
            return [Completion(token_ids=[1], logprobs=[0.0], versions=[0], finish_reason="abort")]

    with pytest.raises(EngineLost, match="aborted"):
        played(Aborts(solves))


@pytest.mark.slow
def test_a_thousand_waiting_episodes_cost_no_thread():
    before = threading.active_count()
    arrived, release = [], threading.Event()

    class Waits(Calculator):
        async def multiply(self, a: int, b: int) -> int:
            """Multiply two integers."""
            arrived.append(1)
            while not release.is_set():
                await asyncio.sleep(0.02)
            return a * b

    threads = Threads(8)

    async def many():
        one = stage(Engine(solves), ThreadHost(env=Waits, threads=threads), limits=Limits(seconds=60.0))
        playing = [asyncio.create_task(play(one, prompt(), i, SEEDS)) for i in range(1000)]
        while len(arrived) < 1000:
            await asyncio.sleep(0.01)
        # The pool, and the event loop of all async methods.
        assert threading.active_count() <= before + 8 + 1
        release.set()
        rows = await asyncio.gather(*playing)
        assert [row[0].reward for row in rows] == [1.0] * 1000

    asyncio.run(many())


def test_a_thread_that_hangs_is_replaced_and_too_many_are_an_error(gate, monkeypatch):
    monkeypatch.setattr("rl.environments.threads.MOST_STUCK", 3)

    async def main():
        threads = Threads(2)
        for _ in range(3):
            with pytest.raises(EnvLate):
                await threads.run(gate.hang, 0.02)
        assert (threads.stuck, await asyncio.gather(*(asyncio.sleep(0, i) for i in range(2)))) == (3, [0, 1])
        with pytest.raises(EnvError, match="3 calls of the environment's methods hang"):
            await threads.run(lambda: 1, 1)
        gate.event.set()
        while threads.stuck:
            await asyncio.sleep(0.01)
        assert await asyncio.gather(*(threads.run(lambda i=i: i, 5) for i in range(9))) == list(range(9))
        assert threads.running <= 2

    asyncio.run(main())


def test_a_turn_costs_the_driver_little():
    """The figure is that of scripts/bench/episodes.py, 2 ms at most; here it may be five times as much."""

    class Talks(Calculator):
        parse = None

        def reply(self, turn):
            return Step(observation="go on")

    one = stage(Engine(lambda before, r: "hello"), env=Talks, limits=Limits(turns=8))
    began = time.process_time()
    group = asyncio.run(play_group(64, lambda i: play(one, prompt(), i, SEEDS), 0))
    assert len(group.rows) == 64
    assert (time.process_time() - began) / (64 * 8) < 0.01


def test_messages_of_an_episode_are_plain_values():
    json.dumps(seen(Calculator).messages)
