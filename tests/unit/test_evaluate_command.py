"""`unison evaluate`: what it plans, what it writes, and what it refuses; tests/e2e/test_evaluate.py runs it."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from models import make_model
from rl.config import Config, RolloutConfig, TrainerConfig
from rl.types import Data
from trainer import evaluations
from trainer.cluster.fleet import Fleet
from trainer.cluster.placement import engines_alone, place
from trainer.commands import evaluate
from trainer.plan.memory import DRIVER, PROCESS, engines_memory, required_memory
from trainer.plan.plan import make_plan

RECIPE = """
from rl import Config, Data, Example, RolloutConfig

config = Config(
    name="sums",
    model={model!r},
    data=Data(train=[Example(prompt="2 + 3 =")]),
    reward=lambda reply: 0.0,
    rollout=RolloutConfig(max_tokens=8, max_model_len=64),
    output_dir={folder!r},
)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("model")))


def config_of(**settings):
    return Config(name="t", model="m", data=Data(train=[]), reward=lambda reply: 0.0, **settings)


def test_the_figures_are_written_with_the_settings_and_shown_as_a_table(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "sums.py").write_text(RECIPE.format(model=model, folder=str(tmp_path)))
    plans = []

    async def measured(plan):
        plans.append(plan)
        metrics = {"eval/held/avg@4": 0.25, "eval/held/avg@4_se": 0.125, "eval/held/pass@4": 0.5}
        problems = {0: {"avg@4": 0.5, "pass@4": 1.0}, 3: {"avg@4": 0.0, "pass@4": float(len(plans) > 1)}}
        return metrics, {"held": problems}, {"held": {"problems": 12, "samples": 4, "temperature": 0.5}}

    monkeypatch.setattr(evaluate, "measured", measured)
    asked = [str(tmp_path / "sums.py"), "--eval-samples", "4", "--eval-temperature", "0.5", "--seed", "3"]
    assert evaluate.evaluate_model(asked) == 0
    against = ["--against", str(tmp_path / "sums-evaluation")]
    assert evaluate.evaluate_model([*asked, "--out", str(tmp_path / "mine"), *against]) == 0
    first, second = (json.loads((tmp_path / f / "evaluation.json").read_text()) for f in ("sums-evaluation", "mine"))
    assert (
        first["metrics"]
        == second["metrics"]
        == {
            "eval/held/avg@4": 0.25,
            "eval/held/avg@4_se": 0.125,
            "eval/held/pass@4": 0.5,
        }
    )
    assert first["sets"] == {"held": {"problems": 12, "samples": 4, "temperature": 0.5}}
    assert (first["model"], first["seed"]) == (model, 3)
    # The same two problems: one passes now that did not before.
    change = {"eval/held/avg@4": 0.0, "eval/held/avg@4_se": 0.0, "eval/held/pass@4": 0.5, "eval/held/pass@4_se": 0.5}
    assert "change" not in first
    assert second["change"] == change
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["eval_samples"] == 4
    assert [plan.placement.learners for plan in plans] == [0, 0]
    shown = capsys.readouterr().out
    assert "0.2500 ± 0.1250" in shown
    assert "0.5000 ± 0.5000" in shown
    with pytest.raises(FileNotFoundError, match=r"no evaluation in .*nothing"):
        evaluate.evaluate_model([*asked, "--against", str(tmp_path / "nothing")])


def test_a_recipe_without_held_out_sets_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"no held-out set: return Data\(train=\[\.\.\.\], evals="):
        evaluations.check_sets({})


def test_engines_alone_need_no_gpu_and_no_memory_of_a_learner(model):
    shape = SimpleNamespace(parameters=2**30)
    big = config_of(rollout=RolloutConfig(engines=2, tensor_parallel=2), trainer=TrainerConfig(ranks=4))
    alone = engines_alone(place(big, cuda=True, gpus=8), big)
    assert (alone.gpus, alone.backend, alone.learners) == (4, "nccl", 0)
    assert engines_memory(big, alone, shape)["engine"]["weights"] == 1.0  # 2 bytes, over 2 GPUs
    shared = config_of()
    assert engines_alone(place(shared, cuda=True, gpus=1), shared).gpus == 1, "the engine has the GPU for itself"
    small = config_of(device="cpu", dtype="float32", rollout=RolloutConfig(engines=2, kv_cache_gib=0.5))
    needs = engines_memory(small, engines_alone(place(small, cuda=False), small), shape)
    assert needs["engine"] == {"weights": 4.0, "KV cache": 0.5, "process": PROCESS["cpu"]["engine"]}
    assert needs["host"] == {"driver and Ray": DRIVER, "2 x engine": 2 * (4.5 + PROCESS["cpu"]["engine"])}
    plan = make_plan(config_of_model(model), learners=False)
    assert set(plan.memory.required) == {"engine", "host"}
    whole = required_memory(plan.config, place(plan.config, cuda=False), plan.memory.shape)
    assert sum(plan.memory.required["host"].values()) < sum(whole["host"].values())


def config_of_model(model):
    return Config(name="t", model=model, data=Data(train=[]), reward=lambda reply: 0.0, device="cpu")


def test_a_lost_engine_comes_back_without_a_learner():
    calls = []

    class Cluster:
        config = config_of(rollout=RolloutConfig(engines=2))
        engines, logs = [0, 1], "logs"

        async def restart_engine(self, index):
            calls.append(index)

        async def open_channel(self):
            calls.append("channel")

    async def main():
        fleet = Fleet(Cluster())
        fleet.recover = lambda: evaluations.restarted(fleet)
        fleet.mark_lost(1, 0, "killed")
        assert await fleet.serving() == [0]
        await fleet._recovering
        return await fleet.serving()

    assert asyncio.run(main()) == [0, 1]
    assert calls == [1, "channel"]
