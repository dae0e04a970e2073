"""A deadline counts from the last progress: of many calls, the last ones wait for the first ones. Time is virtual."""

import asyncio
import re
from contextlib import suppress
from types import SimpleNamespace

import pytest

from orders import run_seeded
from rl.config import Config, Deadlines
from rl.loop.loop import Loop
from rl.protocols import StallError, SyncReport
from rl.types import Completion, Data, Prompt
from trainer.cluster.cluster import Cluster
from trainer.cluster.stacks import stacks

DEADLINE_S = 8.0
CONFIG = Config(
    name="t",
    model="m",
    data=lambda: Data(train=[]),
    reward=lambda reply: 1.0,
    steps=1,
    prompts_per_step=20,
    group_size=1,
    deadlines=Deadlines(sample_s=DEADLINE_S),
)


class Engine:
    """Answers one call after another, `seconds` each; never those from number `stuck` on."""

    def __init__(self, seconds, stuck=10**6):
        self.seconds, self.stuck, self.calls, self.turn = seconds, stuck, 0, asyncio.Lock()

    def ask(self, ask):
        return asyncio.ensure_future(self._answer())

    async def _answer(self):
        number, self.calls = self.calls, self.calls + 1
        async with self.turn:
            if number >= self.stuck:
                await asyncio.sleep(10**6)
            await asyncio.sleep(self.seconds)

    async def stacks(self):
        return "somewhere"


def cluster_of(engine):
    cluster = Cluster(CONFIG, SimpleNamespace(engines=1, learners=0))
    cluster.engines = [engine]
    return cluster


async def sampled(cluster, calls):
    async with asyncio.TaskGroup() as tasks:
        for _ in range(calls):
            tasks.create_task(cluster.ask_engine(0, lambda e: e.sample([1], 1, 0), deadline_s=DEADLINE_S))


def test_three_hundred_calls_at_once_end_although_the_last_waits_for_the_others():
    async def main():
        # Each takes 1 s, and may take 8.
        await sampled(cluster_of(Engine(1.0)), 300)
        assert asyncio.get_running_loop().time() == pytest.approx(300.0)

    run_seeded(main(), 0)


def test_an_engine_that_stops_in_the_middle_is_late_by_one_deadline():
    async def main():
        with pytest.raises(ExceptionGroup) as late:
            await sampled(cluster_of(Engine(1.0, stuck=5)), 20)
        assert isinstance(late.value.exceptions[0], StallError)
        assert "the driver waited 8 s for engine 0 to sample" in str(late.value.exceptions[0])
        assert asyncio.get_running_loop().time() == pytest.approx(5 + DEADLINE_S)

    run_seeded(main(), 0)


def test_one_call_that_takes_longer_than_the_deadline_is_late():
    async def main():
        with pytest.raises(ExceptionGroup):
            await sampled(cluster_of(Engine(DEADLINE_S + 1)), 1)

    run_seeded(main(), 0)


class Rollouts:
    """One group after another."""

    def __init__(self, seconds):
        self.engine = Engine(seconds)

    async def sample(self, token_ids, n, *, seed, temperature=None):
        await self.engine.ask(None)
        return [Completion(token_ids=[7], logprobs=[-1.0], versions=[0], finish_reason="stop")] * n


class Learner:
    async def step(self, batch):
        return {}

    async def publish(self, version):
        return SyncReport(seconds=0.0, pause_seconds=0.0, bytes=0, verified=False)


class Nowhere:
    """A tracker that keeps nothing."""

    def nothing(self, *_):
        pass

    log = alert = table = samples = close = nothing


async def trained(seconds):
    async def score(*_):
        return 1.0, {}

    loop = Loop(
        config=CONFIG,
        rollouts=Rollouts(seconds),
        learner=Learner(),
        prompts=iter(Prompt(ordinal=i, token_ids=[1], task={}) for i in range(1000)),
        decode=lambda ids: "",
        tracker=Nowhere(),
        score=score,
    )
    await loop.run()


def test_a_step_may_take_longer_than_the_deadline_as_long_as_groups_come():
    run_seeded(trained(DEADLINE_S / 2), 0)  # 80 s in all


def test_a_step_to_which_no_group_comes_is_late():
    with pytest.raises(StallError, match="step 1 waited 8 s for one more group: 0 of 20 groups are ready, 20 are"):
        run_seeded(trained(DEADLINE_S * 2), 0)


def test_the_stacks_of_a_thousand_calls_that_wait_for_the_same_are_shown_once():
    async def waits():
        await asyncio.Event().wait()

    async def main():
        calls = [waits() for _ in range(1000)]
        tasks = [asyncio.ensure_future(call) for call in calls]
        await asyncio.sleep(0)
        text = stacks(calls)
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        return text

    text = asyncio.run(main())
    assert re.search(r"1000 times: .*waits waits at", text)
    assert len(text) < 3000
