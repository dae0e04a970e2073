"""Engines that are lost, between updates and in them: who serves, who is started again, and with which weights."""

import asyncio
from types import SimpleNamespace

import pytest

from rl.config import Config, RolloutConfig
from rl.protocols import EngineLost, UpdateFailed
from rl.types import Completion, Data
from rl.weights import WeightManifest
from trainer.cluster.fleet import Fleet
from trainer.cluster.remote import RemoteLearner, RemoteRollouts
from trainer.cluster.start_error import StartError
from trainer.cluster.stubs import recorded


class Cluster:
    """Engines as numbers. `deaths` says in which call (engine, method, how often) an engine dies; `refusals` in which
    update all engines refuse what was staged. With `in_place` an update changes the live weights, as on GPUs."""

    def __init__(self, engines=2, deaths=(), restarts=3, refusals=(), in_place=False):
        self.config = Config(
            name="t",
            model="m",
            data=lambda: Data(train=[]),
            reward=lambda reply: 1.0,
            rollout=RolloutConfig(engines=engines, restarts=restarts),
        )
        self.engines, self.logs = list(range(engines)), "logs"
        self.dead, self.deaths, self.calls = set(), set(deaths), []
        self.holds = dict.fromkeys(self.engines)
        """Weight version of each engine; None: no whole one."""
        self.updating, self.channels = set(), 0
        self.refusals, self.in_place, self.stages = set(refusals), in_place, 0

    async def ask_engine(self, index, ask, *, deadline_s):
        return await self.reach(index, recorded(ask).method)

    async def reach(self, index, method):
        await asyncio.sleep(0)
        self.calls.append((index, method))
        if (index, method, self.calls.count((index, method))) in self.deaths:
            self.dead.add(index)
        if index in self.dead:
            raise EngineLost(f"engine {index} is gone")
        if method == "alive" and index in self.updating:
            raise EngineLost("it holds half an update")
        while method == "sample" and index in self.updating:
            await asyncio.sleep(0)
        if method == "sample":
            version = self.holds[index]
            assert version is not None, "an engine without weights served"
            return [Completion(token_ids=[1], logprobs=[-1.0], versions=[version], finish_reason="stop")]
        return 0.0

    async def ask_engines(self, ask, *, deadline_s=None):
        return [await self.ask_engine(i, ask, deadline_s=0) for i in self.engines]

    async def ask_learners(self, ask, *, deadline_s=None):
        call = recorded(ask)
        if call.method == "step":
            return [{}]
        assert call.method == "publish"
        version = call.args[0]
        for i in self.engines:
            if self.in_place:
                self.updating.add(i)
                self.holds[i] = None
            await self.reach(i, "receive" if self.in_place else "stage")
        self.stages += 1
        if self.stages in self.refusals:
            raise UpdateFailed("bucket 1 changed on its way")
        for i in self.engines:
            await self.reach(i, "commit")
            self.holds[i] = version
            self.updating.discard(i)
        return [WeightManifest(version=version, tensors=(), digests={})]

    async def restart_engine(self, index):
        self.calls.append((index, "restart"))
        self.dead.discard(index)
        self.updating.discard(index)
        self.holds[index] = None

    async def open_channel(self):
        assert not self.dead
        self.channels += 1


def actors(cluster):
    fleet = Fleet(cluster)
    learner = RemoteLearner(cluster, probe=[1], fleet=fleet)

    async def proven(manifest):
        assert set(cluster.holds.values()) == {manifest.version}

    learner._verify = proven
    return SimpleNamespace(fleet=fleet, learner=learner, rollouts=RemoteRollouts(cluster, fleet))


def restarted(cluster):
    return [i for i, method in cluster.calls if method == "restart"]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def test_what_the_doctor_sampled_is_given_once_and_only_for_the_same_request():
    group = [Completion(token_ids=[7], logprobs=[-1.0], versions=[0], finish_reason="stop")]

    async def main():
        a = actors(Cluster(1))
        await a.learner.publish(0)
        a.rollouts.early = {((1, 2), 8, 5): group}
        for other in ({"temperature": 0.0}, {"max_tokens": 3}, {"tools": ()}, {"seed": 6}, {"n": 7}):
            asked = {"n": 8, "seed": 5} | other
            assert await a.rollouts.sample([1, 2], asked.pop("n"), **asked) != group
        assert await a.rollouts.sample([1, 2], 8, seed=5) == group
        assert await a.rollouts.sample([1, 2], 8, seed=5) != group

    run(main())


@pytest.mark.parametrize("engines", [1, 2])
def test_a_lost_engine_comes_back_with_the_published_weights_while_no_update_is_under_way(engines):
    cluster = Cluster(engines, deaths=[(0, "sample", 1)])

    async def main():
        a = actors(cluster)
        await a.learner.publish(0)
        with pytest.raises(EngineLost):
            await a.rollouts.sample([1], 1, seed=0)
        for _ in range(20):
            (completion,) = await a.rollouts.sample([1], 1, seed=0)
            assert completion.versions == [0]
        assert a.fleet.lost == set()

    run(main())
    assert restarted(cluster) == [0]


def test_between_a_step_and_its_update_nobody_gets_weights_that_have_no_version_yet():
    cluster = Cluster(1, deaths=[(0, "sample", 1)])

    async def main():
        a = actors(cluster)
        await a.learner.publish(0)
        await a.learner.step(None)
        with pytest.raises(EngineLost):
            await a.rollouts.sample([1], 1, seed=0)
        waiting = asyncio.create_task(a.rollouts.sample([1], 1, seed=0))
        await asyncio.sleep(0.05)
        assert restarted(cluster) == []
        await a.learner.publish(1)
        assert (await waiting)[0].versions == [1]

    run(main())
    assert restarted(cluster) == [0]


def test_an_engine_that_dies_before_an_update_begins_is_the_only_one_started_again():
    cluster = Cluster(3, deaths=[(1, "listen_to_weights", 2)])

    async def main():
        a = actors(cluster)
        await a.learner.publish(0)
        await a.learner.publish(1)

    run(main())
    assert restarted(cluster) == [1]
    assert set(cluster.holds.values()) == {1}


def test_when_one_dies_in_an_update_in_place_all_that_hold_half_of_it_are_started_again():
    cluster = Cluster(3, deaths=[(1, "receive", 2)], in_place=True)

    async def main():
        a = actors(cluster)
        await a.learner.publish(0)
        await a.learner.publish(1)
        assert any(cause.startswith("engine 0 was lost: it holds half an update") for cause in a.fleet.causes)

    run(main())
    # Engine 2 had not begun.
    assert restarted(cluster) == [0, 1]
    assert set(cluster.holds.values()) == {1}


def test_a_death_that_a_sample_finds_in_an_update_without_a_step_is_mended_by_that_update_alone():
    cluster = Cluster(2, deaths=[(1, "receive", 2)], in_place=True)

    async def main():
        a = actors(cluster)
        await a.learner.publish(0)
        updating = asyncio.create_task(a.learner.publish(1))
        while 1 not in cluster.dead:
            await asyncio.sleep(0)
        with pytest.raises(EngineLost):
            await a.rollouts.sample([1], 1, seed=0, engine=1)
        await updating
        assert (await a.rollouts.sample([1], 1, seed=0))[0].versions == [1]
        assert not a.learner.published.locked()

    run(main())
    assert restarted(cluster) == [0, 1]
    assert cluster.channels == 1


def test_engines_are_started_again_at_the_same_time():
    cluster = Cluster(3, deaths=[(1, "receive", 2)], in_place=True)
    again, meeting = cluster.restart_engine, asyncio.Barrier(2)

    async def restart(index):
        await meeting.wait()  # both are here, or neither goes on
        await again(index)

    cluster.restart_engine = restart

    async def main():
        a = actors(cluster)
        await a.learner.publish(0)
        await a.learner.publish(1)

    run(main())
    assert sorted(restarted(cluster)) == [0, 1]


def test_an_engine_that_cannot_be_started_again_ends_the_round_after_the_others():
    cluster = Cluster(3, deaths=[(1, "receive", 2)], in_place=True, restarts=2)
    again, tries = cluster.restart_engine, []

    async def restart(index):
        tries.append(index)
        if tries == [0]:
            raise EngineLost("engine 0 died in its start")
        await again(index)

    cluster.restart_engine = restart

    async def main():
        a = actors(cluster)
        await a.learner.publish(0)
        await a.learner.publish(1)

    run(main())
    assert (tries, restarted(cluster)) == ([0, 1, 0], [1, 0])
    assert set(cluster.holds.values()) == {1}


def test_engines_that_received_everything_are_not_started_again_when_another_could_not_load():
    cluster = Cluster(3, in_place=True)
    ask = cluster.ask_learners

    async def one_cannot_load(what, *, deadline_s=None):
        if recorded(what).method == "publish" and cluster.stages == 1:
            cluster.stages += 1
            cluster.updating.add(1)  # the sender let the others commit
            cluster.holds |= {0: 1, 1: None, 2: 1}
            raise MemoryError("engine 1 has no memory for the new weights")
        return await ask(what, deadline_s=deadline_s)

    cluster.ask_learners = one_cannot_load

    async def main():
        a = actors(cluster)
        await a.learner.publish(0)
        await a.learner.publish(1)

    run(main())
    assert restarted(cluster) == [1]
    assert set(cluster.holds.values()) == {1}


@pytest.mark.parametrize("phase", ["stage", "commit"])
def test_when_one_dies_in_a_staged_update_the_others_go_on_and_get_it_again(phase):
    cluster = Cluster(3, deaths=[(1, phase, 2)])

    async def main():
        a = actors(cluster)
        await a.learner.publish(0)
        await a.learner.publish(1)

    run(main())
    assert restarted(cluster) == [1]
    assert set(cluster.holds.values()) == {1}


def test_an_update_that_no_engine_took_is_sent_again_over_a_new_channel_and_no_engine_is_started_again():
    cluster = Cluster(2, refusals=[2, 3])

    async def main():
        a = actors(cluster)
        assert (await a.learner.publish(0)).failed == 0
        assert (await a.learner.publish(1)).failed == 2

    run(main())
    assert restarted(cluster) == []
    assert cluster.channels == 2
    assert set(cluster.holds.values()) == {1}


def test_an_update_that_is_refused_again_and_again_ends_the_run_with_its_reason():
    cluster = Cluster(2, refusals=range(2, 9))

    async def main():
        a = actors(cluster)
        await a.learner.publish(0)
        await a.learner.publish(1)

    with pytest.raises(UpdateFailed, match="bucket 1 changed on its way"):
        run(main())
    assert set(cluster.holds.values()) == {0}


def test_the_last_words_of_an_old_process_do_not_condemn_its_successor():
    cluster = Cluster(1)

    async def main():
        a = actors(cluster)
        await a.learner.publish(0)
        a.fleet.mark_lost(0, 0, "gone")
        await a.rollouts.sample([1], 1, seed=0)
        a.fleet.mark_lost(0, 0, "gone")
        assert a.fleet.lost == set()

    run(main())
    assert restarted(cluster) == [0]


def test_engines_that_die_while_another_comes_back_come_back_too():
    cluster = Cluster(3, deaths=[(0, "sample", 1)])
    again = cluster.restart_engine

    async def restart(index):
        if restarted(cluster) == []:
            cluster.dead.add(2)
        await again(index)

    async def channel():
        if cluster.dead:
            raise EngineLost(f"engine {cluster.dead} is gone")

    cluster.restart_engine, cluster.open_channel = restart, channel

    async def main():
        a = actors(cluster)
        await a.learner.publish(0)
        with pytest.raises(EngineLost):
            await a.rollouts.sample([1], 1, seed=0)
        while a.fleet.lost:
            await asyncio.sleep(0)
        assert [c.versions for c in await a.rollouts.sample([1], 1, seed=0)] == [[0]]

    run(main())
    assert restarted(cluster) == [0, 2]
    assert set(cluster.holds.values()) == {0}


def test_weights_that_do_not_arrive_at_an_engine_that_came_back_are_told_as_such():
    cluster = Cluster(1, deaths=[(0, "listen_to_weights", 2)])

    async def main():
        a = actors(cluster)
        await a.learner.publish(0)

        async def wrong(manifest):
            raise RuntimeError("engine 0 and the trainer disagree")

        a.learner._verify = wrong
        await a.learner.publish(1)

    with pytest.raises(RuntimeError, match="engine 0 and the trainer disagree"):
        run(main())
    assert restarted(cluster) == [0]


def test_an_engine_that_dies_again_and_again_ends_the_run_with_the_reason():
    cluster = Cluster(1, deaths=[(0, "sample", n) for n in range(1, 9)], restarts=2)

    async def main():
        a = actors(cluster)
        await a.learner.publish(0)
        for _ in range(9):
            try:
                await a.rollouts.sample([1], 1, seed=0)
            except EngineLost:
                continue

    with pytest.raises(StartError, match=r"engine 0 was lost: engine 0 is gone.*2 times already \(rollout\.restarts\)"):
        run(main())


def test_an_update_that_fails_while_all_engines_live_fails_with_its_own_error():
    cluster = Cluster(2)

    async def broken(ask, *, deadline_s=None):
        raise ValueError("no gradient")

    cluster.ask_learners = broken

    async def main():
        await actors(cluster).learner.publish(0)

    with pytest.raises(ValueError, match="no gradient"):
        run(main())


def test_a_death_that_two_calls_find_at_the_same_time_is_one_death():
    cluster = Cluster(2)

    async def main():
        a = actors(cluster)
        await a.learner.publish(0)
        a.fleet.recover = None  # it would have replaced the process by then
        cluster.dead.add(0)
        looking = asyncio.create_task(a.fleet.look_for_lost())
        await asyncio.sleep(0)  # it has asked, and has no answer yet
        a.fleet.mark_lost(0, 0, "found by a sample")
        assert await looking
        assert a.fleet.causes == ["engine 0 was lost: found by a sample"]

    run(main())
