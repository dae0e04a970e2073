"""A wait that passes its deadline says who waits for whom, and where that one is stuck; nothing hangs."""

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from rl.config import Config, Deadlines
from rl.protocols import StallError
from rl.types import Data
from trainer.cluster import actors
from trainer.cluster.actors import EngineActor, LearnerActor
from trainer.cluster.calls import answer
from trainer.cluster.cluster import Cluster
from trainer.cluster.ray_session import start_ray
from trainer.cluster.stubs import EngineProcess, LearnerProcess

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


class SleepingLearner(LearnerActor):
    object = Sleeper()


class AsyncSleeper(Sleeper):
    async def wake(self) -> None:
        """Done."""


class SleepingEngine(EngineActor):
    object = AsyncSleeper()


@pytest.fixture(scope="module")
def stuck():
    one = Cluster(replace(CONFIG, deadlines=Deadlines(step_s=2.0, sync_s=2.0)), SimpleNamespace(actors=2, device="cpu"))
    one.started_ray = start_ray(one.placement)
    one.learners = [LearnerProcess(actors.watched(SleepingLearner).remote())]
    one.engines = {0: EngineProcess(actors.watched(SleepingEngine).options(max_concurrency=8).remote())}
    for process in (*one.learners, *one.engines.values()):
        asyncio.run(answer(process.ask(lambda sleeper: sleeper.wake()), "an actor did not start", 120.0))
    yield one
    # The engine is stuck, and `aclose` would wait for its answer.
    for process in one.engines.values():
        process.kill()
    asyncio.run(one.aclose())


@pytest.mark.parametrize(
    ("ask", "who", "where"),
    [
        (lambda c: c.ask_learners(lambda rank: rank.step()), "learner rank 0 to step", "step: time.sleep"),
        (lambda c: c.ask_engine(0, lambda e: e.sample(), deadline_s=2.0), "engine 0 to sample", "which_never_comes"),
        # It comes last, because the engine answers nothing afterwards.
        (
            lambda c: c.ask_engine(0, lambda e: e.sample_blocking(), deadline_s=2.0),
            "engine 0 to",
            "sample_blocking: time.sleep",
        ),
    ],
)
def test_a_late_actor_is_named_with_its_stack_at_the_deadline(stuck, ask, who, where):
    # The actor never answers: whoever waited for it, and not for the deadline, would wait for ever.
    with pytest.raises(StallError) as error:
        asyncio.run(ask(stuck))
    assert f"the driver waited 2 s for {who}" in str(error.value)
    assert where in str(error.value)
    assert "It is here:\nits last finished call is wake, " in str(error.value)
