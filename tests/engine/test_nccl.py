"""The NCCL channel through Ray, in disguise: real engines and ranks, and a communicator that needs no GPU.

Faults are planted in an engine's worker (`disguise/sitecustomize.py`); the engine then dies, or cannot load, by itself.
"""

import asyncio
import time
from collections.abc import Callable
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


@pytest.fixture
def run(tmp_path: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def play(scene: Any, *, engines: int, **trainer: Any) -> None:
        monkeypatch.syspath_prepend(DISGUISE)
        monkeypatch.setenv("UNISON_PLANTS", str(tmp_path))
        rollout = RolloutConfig(
            engines=engines, max_tokens=60, max_model_len=128, max_num_seqs=16, kv_cache_gib=0.1, restarts=9
        )
        deadlines = Deadlines(sync_s=SYNC_S, start_s=SYNC_S)
        model = tiny(family="qwen2", tied=False, seed=0)
        config = engine_config(model, rollout=rollout, trainer=TrainerConfig(**trainer), deadlines=deadlines)

        async def main() -> None:
            run = Run(config, tmp_path)
            try:
                run.cluster.boot()
                await run.cluster.start()
                await scene(run)
            finally:
                await run.cluster.close()

        asyncio.run(main())

    return play


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("engines", "stage"), [(2, 1), (2, 3)])
def test_updates_over_nccl_arrive_bit_for_bit_while_engines_sample(run: Callable, engines: int, stage: int) -> None:
    async def scene(run: Run) -> None:
        for _ in range(2):  # verified: digests of every tensor, and a probe of each engine against the trainer
            assert (await run.update()).verified
        sampling = asyncio.create_task(run.sample(4 * engines))
        for _ in range(4):
            await asyncio.gather(
                *(run.rollouts.sample(PROMPT, 1, seed=0, max_tokens=2, engine=e) for e in range(engines))
            )
            report = await run.update()
            assert report.bytes > 4 * 60000, "every update has several chunks"
            print(f"an update: {report.seconds:.2f} s, sampling stood still for {report.pause_seconds:.2f} s")
        versions = [set(completion.versions) for completion in await sampling]
        assert max(map(len, versions)) > 1, "no reply was under way in an update"
        counts = await run.cluster.ask_engines(lambda e: e.counters())
        assert [(c["version"], c["aborted"]) for c in counts] == [(run.version, 0)] * engines
        assert run.fleet.causes == []

    run(scene, engines=engines, ranks=2, zero_stage=stage)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", [1, 3])
def test_an_engine_that_fails_in_any_phase_of_an_update_is_replaced_and_the_run_goes_on(
    run: Callable, stage: int
) -> None:
    async def scene(run: Run) -> None:
        await run.update()
        for phase in ("load", "begin", "broadcast", "commit", "join"):
            sampling = asyncio.create_task(run.sample(8))
            before = list(run.fleet.restarts_of)
            failed = run.plant(phase, 2)
            if phase == "join":  # nobody joins in an update unless another engine has died
                run.plant("begin", 2)
            began = time.time()
            report = await run.update()
            found = failed.stat().st_mtime
            print(f"{phase}: {found - began:.1f} s until the fault, {time.time() - found:.1f} s more until all is well")
            print(*run.fleet.causes, sep="\n")
            assert report.verified
            assert time.time() - found < SOON_S
            restarts = [now - then for now, then in zip(run.fleet.restarts_of, before, strict=True)]
            assert restarts[1] >= 1
            if phase == "load":  # the other one has received everything, and keeps it
                assert restarts == [0, 1]
            assert len(await sampling) == 8
            assert {v for c in await run.sample(4) for v in c.versions} == {run.version}

    run(scene, engines=2, ranks=2, zero_stage=stage)
