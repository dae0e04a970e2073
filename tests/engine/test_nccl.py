"""The NCCL channel through Ray, in disguise: real engines and ranks, and a communicator that needs no GPU.

Faults are planted in an engine's worker (`disguise/sitecustomize.py`); the engine then dies, or cannot load, by itself.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from live import engine_config
from rl.config import Config, Deadlines, RolloutConfig, TrainerConfig
from rl.protocols import EngineLost
from rl.types import Completion
from trainer.cluster.cluster import Cluster
from trainer.cluster.fleet import Fleet
from trainer.cluster.placement import place
from trainer.cluster.remote import RemoteLearner, RemoteRollouts

DISGUISE = Path(__file__).parents[1] / "support" / "disguise"
PROMPT = list(range(10, 30))
SYNC_S = 240.0
"""Seconds after which an update would be late. No test waits for it."""
SOON_S = 60.0
"""Seconds in which a run has recovered. The tests' processes may have a core each."""


class Run:
    """A cluster on CPU whose weight channel is NCCL's, and what the loop sees of it."""

    def __init__(self, config: Config, plants: Path) -> None:
        self.plants, self.version = plants, -1
        self.cluster = Cluster(config, replace(place(config, cuda=False), backend="nccl"))
        self.fleet = Fleet(self.cluster)
        self.learner = RemoteLearner(self.cluster, probe=PROMPT, fleet=self.fleet)
        self.rollouts = RemoteRollouts(self.cluster, self.fleet)

    async def update(self) -> Any:
        """Change the weights and publish them."""
        self.version += 1
        await self.cluster.ask_learners(lambda rank: rank.perturb(3))
        return await self.learner.publish(self.version)

    async def sample(self, n: int) -> list[Completion]:
        """Replies to n prompts; as in a run, one that is lost with its engine is sampled again."""

        async def one(i: int) -> Completion:
            while True:
                with suppress(EngineLost):
                    return (await self.rollouts.sample([*PROMPT, i], 1, seed=i))[0]

        return list(await asyncio.gather(*map(one, range(n))))

    def plant(self, phase: str, rank: int) -> Path:
        """Let the worker of a rank (from 1) fail in this phase; returns the file that says that it did."""
        (self.plants / f"{phase}.{rank}").touch()
        return self.plants / f"{phase}.{rank}.done"


Scene = Callable[[Run], Coroutine[Any, Any, None]]


@pytest.fixture(
    scope="module", params=[(1, False), (3, False), (1, True)], ids=["ZeRO 1", "ZeRO 3", "received while sampling"]
)
def play(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Callable) -> Iterator[Any]:
    """Plays scenes, one after the other, on two engines and two ranks; each begins with whole, verified weights."""
    plants = tmp_path_factory.mktemp("plants")
    stage, aside = request.param
    sizes: dict[str, Any] = {"max_tokens": 60, "max_model_len": 128, "max_num_seqs": 16, "kv_cache_gib": 0.1}
    rollout = RolloutConfig(engines=2, restarts=99, receive_while_sampling=aside, **sizes)
    config = engine_config(
        tiny(family="qwen2", tied=False, seed=0),
        rollout=rollout,
        trainer=TrainerConfig(ranks=2, zero_stage=stage),
        deadlines=Deadlines(sync_s=SYNC_S, start_s=SYNC_S),
    )
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        patch.syspath_prepend(DISGUISE)
        patch.setenv("UNISON_PLANTS", str(plants))
        run = Run(config, plants)

        async def start() -> None:
            run.cluster.boot()
            await run.cluster.start()
            for _ in range(2):  # digests of every tensor, and a probe of each engine against the trainer
                assert (await run.update()).verified

        try:
            runner.run(start())
            yield lambda scene: runner.run(scene(run))
        finally:
            runner.run(run.cluster.aclose())


@pytest.mark.nightly
@pytest.mark.serial
@pytest.mark.timeout(900)
def test_updates_over_nccl_arrive_while_engines_sample(play: Callable[[Scene], None]) -> None:
    async def scene(run: Run) -> None:
        known = len(run.fleet.causes)
        sampling = asyncio.create_task(run.sample(8))
        for _ in range(4):
            await asyncio.gather(*(run.rollouts.sample(PROMPT, 1, seed=0, max_tokens=2, engine=e) for e in range(2)))
            report = await run.update()
            assert report.bytes > 4 * 60000, "every update has several chunks"
            print(f"an update: {report.seconds:.2f} s, sampling stood still for {report.pause_seconds:.2f} s")
        versions = [set(completion.versions) for completion in await sampling]
        assert max(map(len, versions)) > 1, "no reply was under way in an update"
        counts = await run.cluster.ask_engines(lambda e: e.counters())
        assert [(c["version"], c["aborted"]) for c in counts] == [(run.version, 0)] * 2
        assert len(run.fleet.causes) == known

    play(scene)


@pytest.mark.nightly
@pytest.mark.serial
@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", ["load", "begin", "broadcast", "commit", "join"])
def test_an_engine_that_fails_in_an_update_is_replaced_and_the_run_goes_on_without_a_lost_prompt(
    play: Callable[[Scene], None], phase: str
) -> None:
    async def scene(run: Run) -> None:
        sampling = asyncio.create_task(run.sample(8))
        before, known = list(run.fleet.restarts_of), len(run.fleet.causes)
        failed = run.plant(phase, 2)
        if phase == "join":  # nobody joins in an update unless another engine has died
            run.plant("begin", 2)
        began = time.time()
        report = await run.update()
        found, now = failed.stat().st_mtime, time.time()
        print(f"{phase}: {found - began:.1f} s until the fault, {now - found:.1f} s more until all is well")
        print(*run.fleet.causes[known:], sep="\n")
        assert report.verified
        assert now - found < SOON_S
        restarts = [now - then for now, then in zip(run.fleet.restarts_of, before, strict=True)]
        assert restarts[1] == (2 if phase == "join" else 1)
        if phase == "load":  # the other one has received everything, and keeps it
            assert restarts[0] == 0
        assert [len(reply.token_ids) > 0 for reply in await sampling] == [True] * 8
        assert {v for reply in await run.sample(4) for v in reply.versions} == {run.version}

    play(scene)
