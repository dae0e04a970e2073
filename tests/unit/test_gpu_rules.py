"""Small rules of runs on GPUs that need none to be shown: order, deadlines, what is sent."""

import asyncio
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

import trainer.cluster.cluster
import trainer.cluster.stubs
from live import engine_config
from models import make_model
from pair import make_learner
from rl.batch import collate, trajectory
from rl.config import Deadlines, TrainerConfig
from rl.types import Completion, Prompt
from trainer.cluster.cluster import Cluster
from trainer.cluster.stubs import LearnerProcess, recorded
from trainer.learner.learner import join_group


@pytest.mark.parametrize("backend", ["ipc", "nccl", "gloo"])
def test_on_a_shared_gpu_the_learner_frees_its_cache_before_an_engine_starts_again(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    cluster = Cluster.__new__(Cluster)
    cluster.placement, cluster.config = SimpleNamespace(backend=backend), engine_config(Path("m"))
    cluster.engines = [SimpleNamespace(kill=lambda: order.append("kill"))]
    cluster._boot_engine = lambda index: (order.append("boot"), None)

    async def ask_learners(ask: Any) -> list[None]:
        order.append(recorded(ask).method)
        return [None]

    async def nothing(*_: Any, **__: Any) -> None:
        pass

    monkeypatch.setattr(trainer.cluster.cluster, "started", nothing)
    cluster.ask_learners, cluster.ask_engine = ask_learners, nothing
    asyncio.run(cluster.restart_engine(0))
    assert order == ["kill", *(["free_cache"] if backend == "ipc" else []), "boot"]


@pytest.mark.parametrize("longest", ["start_s", "step_s", "sync_s"])
def test_torchs_own_group_waits_longer_than_the_driver_for_anything(
    longest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: dict[str, timedelta] = {}
    store = SimpleNamespace(port=1)
    monkeypatch.setattr(dist, "TCPStore", lambda *_, timeout, **__: waits.update(store=timeout) or store)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, timeout, **__: waits.update(group=timeout))
    for name in ("DS_ACCELERATOR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    deadlines = {"start_s": 7.0, "step_s": 8.0, "sync_s": 9.0} | {longest: 5000.0}
    join_group(0, 1, "cpu", "127.0.0.1", 0, Deadlines(**deadlines))
    assert waits["store"] == timedelta(seconds=5000.0 if longest == "start_s" else 7.0)
    assert waits["group"] > timedelta(seconds=5000)


def test_a_batch_is_written_once_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    put: list[Any] = []
    got: list[Any] = []
    monkeypatch.setattr(trainer.cluster.stubs.ray, "put", lambda value: put.append(value) or f"reference {len(put)}")
    actor = SimpleNamespace(call=SimpleNamespace(remote=got.append))
    LearnerProcess.ask_all([LearnerProcess(actor) for _ in range(8)], lambda rank: rank.step("a batch"))
    assert [(call.method, call.args) for call in put] == [("step", ("a batch",))]
    assert got == ["reference 1"] * 8


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "times"), [(1, 2), (2, 8)])
def test_zero_1_sums_gradients_once_per_optimizer_step_and_zero_2_once_per_micro_batch(
    stage: Any, times: int, tmp_path: Path
) -> None:
    trainer = TrainerConfig(zero_stage=stage, minibatches=2, micro_batch_tokens=6)
    learner = make_learner(engine_config(make_model(tmp_path), trainer=trainer))
    optimizer, sums = learner.parts.engine.optimizer, []
    reduce = optimizer.reduce_ipg_grads
    optimizer.reduce_ipg_grads = lambda *args, **kwargs: (sums.append(args), reduce(*args, **kwargs))[1]
    rows = []
    for i in range(8):
        reply = Completion(token_ids=[9 + i, 8, 7], logprobs=[-3.0] * 3, versions=[0] * 3, finish_reason="stop")
        rows.append(trajectory(Prompt(ordinal=i // 2, token_ids=[5, 6, i], task={}), reply, float(i % 2), {}))
    learner.step(collate(rows))
    assert len(sums) == times


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeeds_bucket_is_not_larger_than_the_model(stage: int, tmp_path: Path) -> None:
    config = engine_config(make_model(tmp_path), trainer=TrainerConfig(zero_stage=stage))
    learner = make_learner(config)
    trained = sum(p.numel() for p in learner.parts.policy.parameters())
    assert learner.parts.engine.optimizer.reduce_bucket_size == trained < 500_000_000
