"""Engines that follow the nodes of a cluster: nodes join, are drained and are lost in the middle of a run, under seeded
orders. No prompt is lost or trained twice, nobody serves without weights, and a new engine serves soon."""

import asyncio
import random
import socket
from collections import Counter
from types import SimpleNamespace

import pytest

from cases import nightly_unless
from orders import run_seeded
from rl.config import Config, Deadlines, RolloutConfig
from rl.loop.loop import Loop
from rl.loop.stream import stream
from rl.protocols import EngineLost, StallError
from rl.types import Completion, Data, Prompt
from rl.validate import check
from rl.weights import WeightManifest
from trainer.cluster.fleet import LOOK_S, Fleet
from trainer.cluster.nodes import gcs
from trainer.cluster.placement import place
from trainer.cluster.remote import RemoteLearner, RemoteRollouts
from trainer.cluster.start_error import StartError
from trainer.cluster.stubs import recorded
from trainer.commands import cluster as commands

pytestmark = pytest.mark.usefixtures("unchecked_types")
BOOT_S, STEP_S, SEND_S = 30.0, 5.0, 1.0
PROMPTS = [Prompt(ordinal=i, token_ids=[i], task={}) for i in range(7)]


def config_of(most=4, **more):
    rollout = RolloutConfig(engines=3, max_engines=most, retries=9, **more)
    made = {"name": "t", "model": "m", "data": Data(train=[]), "reward": lambda reply: 1.0, "group_size": 2}
    return Config(
        **made, steps=24, prompts_per_step=4, max_staleness=2, rollout=rollout, deadlines=Deadlines(start_s=600)
    )


class Process:
    """An engine on a node."""

    def __init__(self, node=None):
        self.node, self.ended, self.holds = node, asyncio.Event(), None

    def kill(self):
        self.ended.set()
        if self.node:
            self.node.engine = None


class Node:
    """Room for one engine. Ray starts none on a node that is drained."""

    def __init__(self):
        self.engine, self.drained = None, False


class Nodes:
    """The cluster as `trainer.cluster.cluster.Cluster` shows it, with nodes that come and go."""

    def __init__(self, config, seed):
        self.config, self.random, self.logs = config, random.Random(seed), "logs"
        self.nodes, self.engines, self.starting = [Node() for _ in range(config.rollout.engines)], {}, {}
        self.joined, self.published, self.sizes, self.ages = asyncio.Condition(), 0, [], []
        self.began, self.waited = {}, []
        """When each new engine had started, and how long those waited that have got weights."""
        for index, node in enumerate(self.nodes):
            self.engines[index] = node.engine = Process(node)
        self.fails = 0
        """How many starts fail from now on."""

    async def delay(self, seconds):
        await asyncio.sleep(seconds * self.random.uniform(0.2, 1.8))

    async def join(self):
        async with self.joined:
            self.nodes.append(Node())
            self.joined.notify_all()

    def lose(self):
        """A node vanishes, with its engine."""
        node = self.random.choice([n for n in self.nodes if n.engine])
        self.nodes.remove(node)
        node.engine.kill()

    async def drained_engines(self):
        return {index for index, process in self.engines.items() if process.node.drained}

    async def start_engine(self, index):
        self.starting[index] = process = Process()
        async with self.joined:
            while not (free := [n for n in self.nodes if n.engine is None and not n.drained]):
                await self.joined.wait()
            process.node, free[0].engine = free[0], process
        await self.delay(BOOT_S)
        if self.fails:
            self.fails -= 1
            self.starting.pop(index).kill()
            raise StartError("other sources")
        if not process.ended.is_set():
            self.began[process] = asyncio.get_running_loop().time()

    async def alive(self, index):
        await asyncio.sleep(0)
        process = self.engines[index]
        if process.ended.is_set():
            raise EngineLost(f"engine {index} is gone")
        return process

    async def ask_engine(self, index, ask, *, deadline_s):
        process = await self.alive(index)
        call = recorded(ask)
        if call.method != "sample":
            return 0.0
        versions = []
        for _ in range(self.random.randint(1, 6)):
            assert process.holds is not None, "an engine without weights served"
            versions.append(process.holds)
            await self.delay(1.0)
            if process.ended.is_set():
                raise EngineLost(f"engine {index} is gone")
        tokens = len(versions)
        one = Completion(
            token_ids=[7] * tokens, logprobs=[-1.0] * tokens, versions=versions, finish_reason="stop", support=None
        )
        return [one] * call.args[1]

    async def ask_engines(self, ask, *, deadline_s=None):
        return [await self.ask_engine(i, ask, deadline_s=0) for i in list(self.engines)]

    async def ask_learners(self, ask, *, deadline_s=None):
        call = recorded(ask)
        if call.method == "step":
            (batch,) = call.args
            self.ages.append(self.published - int(batch.versions[batch.mask].min()))
            self.sizes.append(len(self.engines))
            await self.delay(STEP_S)
            return [{"actor/grad_norm": 1.0}]
        (version, _), channel = call.args, self.channel
        for index, process in channel.items():
            await self.delay(SEND_S)
            if process.ended.is_set():
                raise EngineLost(f"engine {index} is gone")
        for process in channel.values():
            process.holds = version
            if process in self.began:
                self.waited.append(asyncio.get_running_loop().time() - self.began.pop(process))
        self.published = version
        return [WeightManifest(version=version, tensors=(), digests={})]

    async def open_channel(self):
        for index in list(self.engines):
            await self.alive(index)
        self.channel = dict(self.engines)


class Elastic:
    """A run of the real loop on such a cluster."""

    def __init__(self, seed, **more):
        self.config = config_of(**more)
        self.cluster = cluster = Nodes(self.config, seed)
        self.fleet = Fleet(cluster)
        self.learner = RemoteLearner(cluster, probe=[1], fleet=self.fleet)

        async def verified(manifest):
            assert {p.holds for p in cluster.engines.values()} == {manifest.version}

        self.learner._verify = verified
        self.loop = Loop(
            config=self.config,
            rollouts=RemoteRollouts(cluster, self.fleet),
            learner=self.learner,
            prompts=stream(PROMPTS, seed),
            decode=str,
            tracker=self,
            score=self.score,
        )

    def log(self, step, metrics):
        """Where it is."""

    async def score(self, reward, reply, ordinal, deadline_s):
        return 1.0, {}

    async def reaches(self, engines):
        """Wait until so many serve."""
        while len(self.fleet.now()) != engines:
            assert asyncio.get_running_loop().time() < 5000, f"{len(self.fleet.now())} engines, and not {engines}"
            await asyncio.sleep(0.5)

    async def run(self, story):
        await self.cluster.open_channel()
        await self.learner.publish(0)
        self.fleet.follow()
        running = asyncio.create_task(self.loop.run())
        telling = asyncio.create_task(story(self))
        await asyncio.wait({running, telling}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        await telling
        await running

    def check(self):
        config, admission = self.config, self.loop.admission
        states = admission.ledger.states
        assert admission.version == config.steps
        assert max(self.cluster.ages) <= config.max_staleness, "a token older than max_staleness"
        assert sorted(states) == list(range(len(states))), "a prompt of the stream is nowhere"
        assert Counter(states.values())["trained"] == config.steps * config.prompts_per_step
        assert admission.ledger.pending() == 0
        assert not [state for state in states.values() if state.startswith("failed")], "a prompt was given up"
        # Of delays that are up to 1.8 times as long: a step and its update, or an update and the next one.
        assert max(self.cluster.waited, default=0.0) <= 1.8 * (STEP_S + 8 * SEND_S), (
            f"served late: {self.cluster.waited}"
        )
        return len(self.cluster.waited)


async def three_two_four(run):
    """One of three is drained or lost; then two nodes join."""
    while not run.cluster.sizes:
        await asyncio.sleep(0.1)
    await asyncio.sleep(run.cluster.random.uniform(0, 15))
    if run.cluster.random.random() < 0.5:
        run.cluster.lose()
    else:
        leaving = run.cluster.random.choice(run.cluster.nodes)
        leaving.drained = True
    await run.reaches(2)
    for _ in range(2):
        await run.cluster.join()
        await run.cluster.delay(5)
    await run.reaches(4)


@pytest.mark.parametrize("block", nightly_unless(lambda block: block < 1, range(6)))
def test_three_engines_become_two_and_then_four_and_nothing_is_lost(block):
    new = 0
    for seed in range(block * 50, (block + 1) * 50):

        async def main(seed=seed):
            nonlocal new
            run = Elastic(seed)
            await run.run(three_two_four)
            new += run.check()
            assert {2, 3, 4} <= set(run.cluster.sizes), run.cluster.sizes

        try:
            run_seeded(main(), seed)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
    assert new >= 80, "new engines did not serve"


def test_an_engine_whose_node_is_drained_returns_its_groups_before_it_ends():
    ended = []

    async def story(run):
        await asyncio.sleep(3)
        process = run.cluster.engines[1]
        kill, asked = process.kill, []

        def ends():
            ended.append(run.fleet.load[1])
            kill()

        process.kill, run.cluster.nodes[1].drained = ends, True
        await asyncio.sleep(LOOK_S + 0.1)
        sample = run.cluster.ask_engine

        async def listening(index, ask, *, deadline_s):
            if recorded(ask).method == "sample":
                asked.append(index)
            return await sample(index, ask, deadline_s=deadline_s)

        run.cluster.ask_engine = listening
        await run.reaches(2)
        await process.ended.wait()
        assert asked
        assert 1 not in asked, "it got a new group"

    async def main():
        run = Elastic(0, restarts=0)  # a node that is drained is no loss
        await run.run(story)
        run.check()

    run_seeded(main(), 0)
    assert ended == [0]


def test_a_node_on_which_no_engine_starts_ends_no_run():
    async def story(run):
        run.cluster.fails = 99
        await run.cluster.join()
        while run.cluster.fails > 99 - 1 - run.config.rollout.restarts:
            await asyncio.sleep(1)

    async def main():
        run = Elastic(0)
        await run.run(story)
        run.check()
        assert run.fleet.causes == ["engine 3 did not start: other sources"] * 4

    run_seeded(main(), 0)


def test_when_every_node_is_gone_the_run_waits_for_another_one():
    async def story(run):
        await asyncio.sleep(7)
        for _ in range(3):
            run.cluster.lose()
        await run.reaches(0)
        await asyncio.sleep(100)
        await run.cluster.join()
        await run.reaches(1)

    async def main():
        run = Elastic(0)
        await run.run(story)
        run.check()

    run_seeded(main(), 0)


def test_when_no_node_comes_the_run_ends_with_the_reason():
    async def story(run):
        for _ in range(3):
            run.cluster.lose()

    with pytest.raises(StallError, match="no engine is left, and no node had room for one within 600 s"):
        run_seeded(Elastic(0).run(story), 0)


def test_losses_are_counted_from_the_last_update_on():
    async def story(run):
        for _ in range(6):
            await run.reaches(3)
            run.cluster.lose()
            await run.cluster.join()
            await run.reaches(2)

    async def main():
        run = Elastic(0, restarts=1)
        await run.run(story)
        run.check()
        assert len([cause for cause in run.fleet.causes if "was lost" in cause]) == 6

    run_seeded(main(), 0)


def test_most_engines_are_no_fewer_than_those_at_the_start_and_share_no_gpu():
    check(config_of(most=3))
    with pytest.raises(ValueError, match=r"rollout\.max_engines=2 must be at least rollout\.engines=3"):
        check(config_of(most=2))
    lone = config_of()
    lone = Config(**{**vars(lone), "rollout": RolloutConfig(engines=1, max_engines=2)})
    assert place(lone, cuda=True, gpus=1).backend == "nccl"
    assert place(Config(**{**vars(lone), "rollout": RolloutConfig()}), cuda=True, gpus=1).backend == "ipc"


def test_a_node_that_stops_with_drain_names_itself_and_ends_when_its_engines_have_left(tmp_path, monkeypatch, capsys):
    here, other = tmp_path / "unison-ray-10400", "/tmp/unison-ray-10400"
    mine = socket.gethostname()
    nodes = [
        SimpleNamespace(node_manager_hostname=host, temp_dir=f"{folder}/r", node_id=name)
        for host, folder, name in ((mine, other, b"a"), ("another", here, b"b"), (mine, here, b"c"))
    ]
    order, engines = [], [True, True, False]
    client = SimpleNamespace(drain_node=lambda name, reason, why, until: order.append(("drain", name, reason)))
    node = SimpleNamespace(folder=here, head="h:1", token=tmp_path, end=lambda: order.append("end") or 3)
    monkeypatch.setattr(gcs, "alive_nodes", lambda head, token: nodes)
    monkeypatch.setattr(gcs, "raylet", SimpleNamespace(GcsClient=lambda address: client))
    monkeypatch.setattr(commands, "chosen", lambda base: node)
    monkeypatch.setattr(commands, "has_engines", lambda folder: order.append("look") or engines.pop(0))
    monkeypatch.setattr(commands, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda seconds: None))
    assert commands.cluster(["stop", "--drain", "60"]) == 0
    assert order == [("drain", b"c".hex(), gcs.PREEMPTION), "look", "look", "look", "end"]
    order.clear()
    assert commands.cluster(["stop"]) == 0
    assert order == ["end"]
