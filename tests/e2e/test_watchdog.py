"""A wait that passes its deadline says who waits for whom, and where that one is stuck; nothing hangs."""

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from rl.config import Config, Deadlines
from rl.protocols import StallError
from rl.types import Data
from trainer.cluster import cluster
from trainer.cluster.actors import AsyncHost, Host, actor_of
from trainer.cluster.cluster import Cluster

CONFIG = Config(name="t", model="m", data=lambda: Data(train=[]), reward=lambda reply: 1.0)


class Sleeper:
    """Stands in for a learner rank that is stuck in a collective, or an engine that waits for vLLM."""

    def wake(self) -> None:
        """Done."""

    def step(self) -> None:
        time.sleep(3600)

    async def sample(self) -> None:
        await self.which_never_comes()

    async def which_never_comes(self) -> None:
        await asyncio.Event().wait()

    async def sample_blocking(self) -> None:
        time.sleep(3600)


class SleepingHost(Host):
    object = Sleeper()


class AsyncSleeper(Sleeper):
    async def wake(self) -> None:
        """Done."""


class SleepingAsyncHost(AsyncHost):
    object = AsyncSleeper()


@pytest.fixture(scope="module")
def stuck():
    one = Cluster(replace(CONFIG, deadlines=Deadlines(step_s=2.0, sync_s=2.0)), SimpleNamespace(engines=1, learners=1))
    one.started_ray = cluster.start_ray(one.placement)
    one.learners = [actor_of(SleepingHost).remote()]
    one.engines = [actor_of(SleepingAsyncHost).options(max_concurrency=8).remote() for _ in range(2)]
    for actor in (*one.learners, *one.engines):
        asyncio.run(cluster.answer(actor.call.remote("wake"), "an actor did not start", 120.0))
    yield one
    asyncio.run(one.close())


@pytest.mark.parametrize(
    ("ask", "who", "where"),
    [
        (lambda c: c.ask_learners("step"), "learner rank 0 to step", "step: time.sleep"),
        (lambda c: c.ask_engine(0, "sample", deadline_s=2.0), "engine 0 to sample", "which_never_comes"),
        (lambda c: c.ask_engine(1, "sample_blocking", deadline_s=2.0), "engine 1 to", "sample_blocking: time.sleep"),
    ],
)
def test_a_late_actor_is_named_with_its_stack_at_the_deadline(stuck, ask, who, where):
    # The actor never answers: whoever waited for it, and not for the deadline, would wait for ever.
    with pytest.raises(StallError) as error:
        asyncio.run(ask(stuck))
    assert f"the driver waited 2 s for {who}" in str(error.value)
    assert where in str(error.value)
    assert "It is here:\nit last answered to wake, " in str(error.value)
