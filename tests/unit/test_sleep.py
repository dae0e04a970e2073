"""Engine and learner take turns on a GPU: who has memory when, in every order of samples, steps, updates and deaths."""

import asyncio
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from live import engine_config
from models import make_model
from pair import make_learner
from rl.batch import collate, trajectory
from rl.config import Config, RolloutConfig, TrainerConfig
from rl.protocols import EngineLost
from rl.types import Completion, Data, Prompt
from rl.weights import WeightManifest
from rollout.engine import Engine
from rollout.settings import engine_args
from trainer.cluster.fleet import Fleet
from trainer.cluster.placement import place
from trainer.cluster.remote import RemoteLearner, RemoteRollouts
from trainer.cluster.stubs import recorded
from trainer.plan.memory import SAMPLING, UPDATING, Shape, memory_of_gpus, required_memory
from trainer.plan.rules import check_turns

ALL = {"weights", "kv_cache"}
BILLION = Shape(parameters=2**30, layers=16, hidden=1024, inner=4096, vocabulary=2**15, adapted=2**20)


def config(trainer: TrainerConfig | None = None, **more: Any) -> Config:
    made = {"name": "t", "model": "m", "data": Data(train=[]), "reward": lambda reply: 0.0}
    rollout = RolloutConfig(sleep=True, max_tokens=64, max_model_len=256, gpu_memory_utilization=0.75, restarts=99)
    settings = {"share_gpu": True, "rollout": rollout, "trainer": trainer or TrainerConfig(zero_stage=2)} | more
    return Config(**made, **settings)


class Llm:
    """vLLM as its sources have it: what level 2 unmaps, what resumes by itself, and what is an illegal address."""

    def __init__(self) -> None:
        self.memory, self.whole, self.paused, self.errored = set(ALL), False, False, False
        self.dies: str = ""
        self.model_config = SimpleNamespace(return_sampling_mask=False)

    def _reach(self, method: str) -> None:
        self.errored = self.errored or method == self.dies
        if self.errored:
            raise EngineLost(f"it died in {method}")

    async def pause_generation(self, mode: str, clear_cache: bool) -> None:
        self._reach("pause")
        self.paused = True

    async def resume_generation(self) -> None:
        assert self.memory == ALL
        self.paused = False

    async def sleep(self, level: int, mode: str) -> None:
        assert (level, mode) == (2, "keep")
        self._reach("sleep")
        self.paused, self.whole = True, False
        self.memory.clear()

    async def wake_up(self, tags: list[str]) -> None:
        self._reach("wake")
        assert not self.memory & set(tags), "mapped twice"
        self.memory |= set(tags)
        self.paused = self.memory != ALL

    async def start_weight_update(self) -> None:
        self._reach("start")
        assert self.paused
        assert "weights" in self.memory
        self.whole = False

    async def update_weights(self, request: Any) -> None:
        self._reach("update")
        assert "weights" in self.memory
        assert self.paused

    async def finish_weight_update(self, weight_version: str) -> None:
        self._reach("finish")
        assert "weights" in self.memory
        self.whole = True

    async def update_weight_version(self, version: str) -> None: ...

    async def check_health(self) -> None:
        self._reach("health")

    async def generate(self, prompt: Any, params: Any, request_id: str) -> Any:
        for _ in range(2):  # two tokens
            while self.paused and not self.errored:
                await asyncio.sleep(0)
            self._reach("generate")
            assert self.memory == ALL, "an illegal address"
            assert self.whole, "without weights"
            await asyncio.sleep(0)
        yield SimpleNamespace(finished=True, outputs=[SimpleNamespace(weight_versions=[])])


class Cluster:
    """An engine and a rank on each GPU."""

    def __init__(self, config: Config) -> None:
        self.config, self.logs = config, "logs"
        self.freed, self.steps, self.restarts = True, 0, 0
        self.engines = {i: self.boot() for i in range(config.rollout.engines)}

    def boot(self) -> Any:
        engine = Engine.__new__(Engine)
        engine.config, engine.llm, engine.open, engine.requests = self.config, Llm(), asyncio.Event(), 0
        engine.version, engine.updating, engine.slots, engine.generations = -100, False, asyncio.Semaphore(8), 0
        engine._await_vllm = lambda call: call
        return engine

    async def begin(self) -> None:
        for engine in self.engines.values():
            await engine.sleep()  # before the learner is built
            await engine.start()
            assert not engine.open.is_set()

    async def ask_engine(self, index: int, ask: Any, *, deadline_s: float) -> Any:
        call, engine = recorded(ask), self.engines[index]
        for _ in range(3 * index):  # the others answer later
            await asyncio.sleep(0)
        if call.method == "listen_to_weights":
            engine.llm._reach("listen")
            return None
        if call.method == "sample":
            replying = asyncio.ensure_future(engine.generate([1], SimpleNamespace(top_k=1)))
            while not replying.done():
                if engine.llm.errored:  # its actor is gone, and with it whoever waited
                    replying.cancel()
                    raise EngineLost("the process is gone")
                await asyncio.sleep(0)
            replying.result()
            return [Completion(token_ids=[1], logprobs=[-1.0], versions=[engine.version], finish_reason="stop")]
        return await call.on(engine)

    async def ask_engines(self, ask: Any, *, deadline_s: float | None = None) -> list[Any]:
        return await asyncio.gather(*(self.ask_engine(i, ask, deadline_s=0) for i in self.engines))

    async def each_engine(self, ask: Any) -> list[Any]:
        asking = [self.ask_engine(i, ask, deadline_s=0) for i in self.engines]
        return await asyncio.gather(*asking, return_exceptions=True)

    async def ask_learners(self, ask: Any, *, deadline_s: float | None = None) -> list[Any]:
        call, engines = recorded(ask), list(self.engines.values())
        if call.method == "step":
            for e in engines:
                assert not e.llm.memory or e.llm.errored, "both have memory"
            self.steps, self.freed = self.steps + 1, False
            await asyncio.sleep(0)
            return [{}]
        if call.method == "free_cache":
            self.freed = True
            return [None]
        assert call.method == "publish"
        failed = [await self.updated(e, call.args[0]) for e in engines]
        for error in filter(None, failed):
            raise error
        return [WeightManifest(version=call.args[0], tensors=(), digests={})]

    async def updated(self, e: Any, version: int) -> EngineLost | None:
        """One engine's part in an update; a patient client goes on with the others where it fails."""
        try:
            await e.start_weight_update()
            await e.update_weights({})
            assert "kv_cache" not in e.llm.memory or not e.asleep
            await e.finish_weight_update(version)
        except EngineLost as error:
            return error
        if e.asleep:
            assert not e.open.is_set(), "it resumed with its KV unmapped"
            self.freed = False
        return None

    async def restart_engine(self, index: int) -> None:
        self.restarts += 1
        self.engines[index] = self.boot()
        await self.engines[index].start()

    async def open_channel(self) -> None: ...


@pytest.mark.parametrize("engines", [1, 3])
@pytest.mark.parametrize("seed", range(60))
def test_in_no_order_of_events_both_have_memory_and_no_request_is_lost(seed: int, engines: int) -> None:
    dice = random.Random(seed)

    async def main() -> None:
        run = config()
        cluster = Cluster(replace(run, rollout=replace(run.rollout, engines=engines)))
        fleet = Fleet(cluster)
        learner, rollouts = RemoteLearner(cluster, probe=[1], fleet=fleet), RemoteRollouts(cluster, fleet)

        async def verified(manifest: WeightManifest) -> None:
            for engine in cluster.engines.values():
                assert engine.open.is_set()
                assert engine.llm.memory == ALL
            assert cluster.freed, "the learner keeps what the KV cache needs"

        learner._verify = verified

        async def sample() -> Completion:
            while True:
                try:
                    return (await rollouts.sample([1], 1, seed=0))[0]
                except EngineLost:
                    await asyncio.sleep(0)

        await cluster.begin()
        waiting = [asyncio.create_task(sample())]  # it comes before there are weights
        await learner.publish(0)
        for step in range(1, 6):
            waiting += [asyncio.create_task(sample()) for _ in range(dice.randrange(3))]
            for _ in range(dice.randrange(6)):
                await asyncio.sleep(0)
            if dice.random() < 0.5:
                phases = ["sleep", "wake", "start", "update", "finish", "generate", "listen", "health"]
                cluster.engines[dice.randrange(engines)].llm.dies = dice.choice(phases)
            await learner.step(None)
            waiting += [asyncio.create_task(sample()) for _ in range(dice.randrange(2))]
            await learner.publish(step)
        assert {v for reply in await asyncio.gather(*waiting) for v in reply.versions} <= set(range(6))
        assert cluster.steps == 5
        await fleet.serving()
        assert {engine.version for engine in cluster.engines.values()} == {5}

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"share_gpu": False}, "share no GPU: set share_gpu=True"),
        ({"max_staleness": 1}, "max_staleness=1 samples while the learner steps: use 0"),
        ({"trainer": TrainerConfig(zero_stage=1)}, "zero_stage=1 cannot move its states: use 2"),
        ({"trainer": TrainerConfig(zero_stage=2, offload="optimizer")}, "in host memory always: leave it off"),
    ],
)
def test_where_they_cannot_take_turns_the_run_is_refused(more: dict, says: str) -> None:
    right = config()
    check_turns(right, place(right, cuda=True, gpus=1))
    wrong = config(**more)
    with pytest.raises(ValueError, match=rf"^rollout\.sleep=True, but .*{says}"):
        check_turns(wrong, place(wrong, cuda=True, gpus=2))
    off = replace(wrong, rollout=replace(wrong.rollout, sleep=False))
    check_turns(off, place(off, cuda=True, gpus=2))


def test_vllm_is_asked_for_an_allocator_that_can_sleep() -> None:
    for sleep in (True, False):
        asked = config(rollout=RolloutConfig(sleep=sleep))
        assert engine_args(asked, device="cuda", backend="ipc", model="m")["enable_sleep_mode"] is sleep


def test_each_phase_has_its_own_reckoning_of_memory() -> None:
    run = config()
    placement = place(run, cuda=True, gpus=1)
    needs, limits = required_memory(run, placement, BILLION), memory_of_gpus(run, placement, 80)
    # 2^30 parameters in bf16: 2 GiB on either side, and 0.25 GiB of weights under way on both ends.
    assert needs[SAMPLING] == {"weights": 2.0, "process": 0.8}
    assert limits[SAMPLING] == 20
    parts = {"weights of the engine": 2.0, "weights of the learner": 2.0, "weights under way": 0.5}
    assert {name: needs[UPDATING][name] for name in parts} == parts
    assert limits[UPDATING] == 80
    assert limits["learner rank"] == 80 - 1.2
    assert limits["engine"] == 60
    assert "weights under way" not in needs["learner rank"]
    assert needs["host"]["gradients, masters and Adam, while the engine samples"] == 4.0 + 12.0
    resident = replace(run, rollout=replace(run.rollout, sleep=False))
    assert SAMPLING not in required_memory(resident, placement, BILLION)
    assert memory_of_gpus(resident, placement, 80)["learner rank"] == 20
    assert math.isfinite(limits[SAMPLING])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_that_were_in_host_memory_change_no_bit_of_what_is_learned(dtype: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    plain = engine_config(model, dtype=dtype, trainer=TrainerConfig(lr=1e-2, minibatches=2, zero_stage=2))
    turns = replace(plain, rollout=replace(plain.rollout, sleep=True))
    prompt = Prompt(ordinal=0, token_ids=[5, 6, 7], task={})
    rows = [
        Completion(token_ids=[9 + i, 8, 7 + i], logprobs=[-3.0] * 3, versions=[0] * 3, finish_reason="stop")
        for i in range(4)
    ]
    batch = collate([trajectory(prompt, row, float(i % 2), {}) for i, row in enumerate(rows)])
    found: list[dict[str, torch.Tensor]] = []
    for config in (plain, turns):
        learner = make_learner(config)
        moved = learner.parts.engine.optimizer.offloaded_states
        assert bool(moved) is config.rollout.sleep
        for _ in range(2):
            learner.step(batch)
        (tmp_path / "state").mkdir(exist_ok=True)
        learner.save_state(str(tmp_path / "state"))
        learner.step(batch)
        again = make_learner(config)
        again.load_state(str(tmp_path / "state"))
        again.step(batch)
        assert bool(again.parts.engine.optimizer.offloaded_states) is config.rollout.sleep
        weights = {name: tensor.clone() for name, tensor in learner.weights}
        resumed = {f"resumed/{name}": tensor.clone() for name, tensor in again.weights}
        found.append(weights | resumed)
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
