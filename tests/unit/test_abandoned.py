"""An environment whose episode has ended while its constructor still runs is closed when it is made."""

import asyncio
import threading
from functools import partial

import pytest

from episodes import Calculator, Engine, prompt, solves, stage
from rl.environments.group import play_group
from rl.environments.host import ThreadHost
from rl.environments.play import play
from rl.environments.types import EnvLate
from rl.loop.stream import turn_seed
from trainer.cluster.env_workers import EnvProcess

SEEDS = partial(turn_seed, 0, 0, 0)


class Slow:
    """Made when the gate opens."""

    def __init__(self):
        self.building, self.gate, self.closed = threading.Event(), threading.Event(), threading.Event()

    def environment(self, *, asynchronous=False, raises=False):
        state = self

        class Env(Calculator):
            def __init__(self, task):
                super().__init__(task)
                state.building.set()
                state.gate.wait(30)
                if raises:
                    raise ConnectionError("no sandbox")

            def close(self):
                state.closed.set()
                if raises:
                    raise ConnectionError("no sandbox")

        class Async(Env):
            async def close(self):
                await asyncio.sleep(0)
                state.closed.set()

        return Async if asynchronous else Env


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_constructor_that_runs_while_its_episode_is_cancelled(asynchronous):
    slow = Slow()
    host = ThreadHost(env=slow.environment(asynchronous=asynchronous))

    async def main():
        making = asyncio.create_task(host.make({"answer": "1"}, 30))
        await asyncio.to_thread(slow.building.wait, 30)
        making.cancel()
        await asyncio.wait({making})
        assert making.cancelled()

    asyncio.run(main())
    assert not slow.closed.is_set()
    slow.gate.set()
    assert slow.closed.wait(30)


def test_a_constructor_that_is_late():
    slow = Slow()
    with pytest.raises(EnvLate, match="longer than"):
        asyncio.run(ThreadHost(env=slow.environment()).make({"answer": "1"}, 0.02))
    slow.gate.set()
    assert slow.closed.wait(30)


def test_a_constructor_whose_answer_comes_together_with_the_cancellation():
    slow = Slow()
    slow.gate.set()
    host = ThreadHost(env=slow.environment())

    async def main():
        making = asyncio.create_task(host.make({"answer": "1"}, 30))
        await asyncio.to_thread(slow.building.wait, 30)
        while host.threads._idle < 1:  # the thread has answered, and the event loop has not read it
            pass
        making.cancel()
        await asyncio.wait({making})
        if not making.cancelled():
            await making.result().close(30)

    asyncio.run(main())
    assert slow.closed.wait(30)


def test_a_constructor_that_raises_when_nobody_waits_is_no_trouble():
    slow = Slow()
    host = ThreadHost(env=slow.environment(raises=True))

    async def main():
        with pytest.raises(EnvLate):
            await host.make({"answer": "1"}, 0.02)
        slow.gate.set()
        while host.threads.stuck:
            await asyncio.sleep(0.01)

    asyncio.run(main())
    assert not slow.closed.is_set(), "there is nothing to close"


def test_the_others_of_a_group_that_fails_are_closed_although_they_were_not_made_yet():
    slow, made = Slow(), []
    waits = slow.environment()

    def env(task):
        made.append(task)
        if len(made) == 1:
            return waits(task)
        slow.building.wait(30)
        raise ConnectionError("no sandbox")

    one = stage(Engine(solves), ThreadHost(env=env))
    group = asyncio.run(play_group(2, lambda i: play(one, prompt(), i, SEEDS), 0))
    assert group.failed == "env_error"
    slow.gate.set()
    assert slow.closed.wait(30)


@pytest.mark.parametrize("when", ["closed", "late"])
def test_the_same_in_a_process_of_its_own(when):
    slow = Slow()
    process = EnvProcess(slow.environment())

    async def main():
        making = asyncio.create_task(process.make(1, {"answer": "1"}, 30 if when == "closed" else 0.02))
        await asyncio.to_thread(slow.building.wait, 30)
        if when == "closed":
            assert await process.close(1, 30) == ("result", None)
            slow.gate.set()
            assert (await making)[0] == "result"
        else:
            assert (await making)[0] == "late"
            slow.gate.set()

    asyncio.run(main())
    assert slow.closed.wait(30)
    assert (process.environments, process.making) == ({}, set())
