"""Reward models are part of the plan: GPUs, memory, and a model of another kind is refused before anything starts."""

import asyncio
import re

import pytest
from ray.exceptions import RayActorError

from models import make_model
from reward_models import make_reward_model
from rl.config import Config, RolloutConfig
from rl.judges import Calls, JudgeError, OpenAIJudge, RewardModel
from rl.judges.reward_model import connect
from rl.protocols import EngineLost
from rl.types import Data, Example
from trainer.cluster.placement import check_fits, engines_alone, place
from trainer.cluster.process_env import without_functions
from trainer.cluster.reward_models import FrozenEngine, RewardModels
from trainer.cluster.stubs import recorded
from trainer.plan.dry_run import dry_run
from trainer.plan.memory import DRIVER, PROCESS, remedies
from trainer.plan.plan import make_plan

BY_URL = OpenAIJudge(url="http://x/v1", model="u", prompt="{reply}", parse=float)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy, and its reward model."""
    policy, scorer = (tmp_path_factory.mktemp(name) for name in ("policy", "scorer"))
    make_model(policy)
    return str(policy), str(scorer), make_reward_model(scorer).num_parameters()


def config_of(model, *judges, **settings):
    data = Data(train=[Example(prompt="1+1=")])
    rollout = settings.pop("rollout", RolloutConfig(max_tokens=8, max_model_len=16))
    return Config(name="t", model=model, data=data, reward=len, judges=judges, rollout=rollout, **settings)


def test_each_reward_model_has_a_gpu_of_its_own_and_a_url_has_none():
    config = config_of("m", RewardModel(model="a"), RewardModel(model="b"), BY_URL)
    placement = place(config, cuda=True, gpus=4)
    assert (placement.reward_models, placement.gpus, placement.actors, placement.backend) == (2, 4, 4, "nccl")
    assert ("reward models", "2 x 1 GPU") in placement.table()
    check_fits(placement, gpus=4)
    with pytest.raises(ValueError, match=r"needs 4 GPUs \(.* \+ 2 reward models x 1\), but the cluster has 3"):
        check_fits(placement, gpus=3)
    assert engines_alone(placement, config).reward_models == 2
    # One GPU is left for the rest.
    shared = place(config, cuda=True, gpus=3)
    assert (shared.backend, shared.gpus) == ("ipc", 3)
    assert place(config, cuda=False).gpus == 0


def test_its_memory_is_in_the_plan_and_in_the_dry_run(models, capsys, monkeypatch):
    policy, scorer, parameters = models
    judge = RewardModel(model=scorer, name="mine", dtype="float32", kv_cache_gib=0.25)
    plan = make_plan(config_of(policy, judge, device="cpu"))
    own = plan.memory.required["reward model mine"]
    process = PROCESS["cpu"]["engine"]
    assert own == {"weights": pytest.approx(4 * parameters / 2**30), "KV cache": 0.25, "process": process}
    bare = make_plan(config_of(policy, device="cpu")).memory.required
    assert set(plan.memory.required) - set(bare) == {"reward model mine"}
    more = sum(plan.memory.required["host"].values()) - sum(bare["host"].values())
    assert more == pytest.approx(sum(own.values()))
    assert bare["host"]["driver and Ray"] == DRIVER
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("UNISON_IGNORE_MEMORY", "1")
    dry_run(config_of(policy, judge, device="cpu"))
    shown = capsys.readouterr().out
    assert "memory: reward model mine" in shown
    assert "1 x 1 CPU process" in shown


def test_one_that_does_not_fit_is_refused_with_what_would_help(models):
    policy, scorer, _ = models
    judge = RewardModel(model=scorer, name="mine", kv_cache_gib=5000.0)
    plan = make_plan(config_of(policy, judge, device="cpu"))
    with pytest.raises(ValueError, match=r"the host needs .*reward model mine 500\d"):
        plan.memory.check(plan.config)
    assert remedies(plan.config, "reward model mine") == ["a smaller reward model, or one behind a URL"]


def test_another_kind_of_model_is_refused(models, tmp_path):
    policy, _, _ = models

    def plan_with(judge):
        return make_plan(config_of(policy, judge, device="cpu")).memory

    with pytest.raises(ValueError, match=r"is a Qwen2ForCausalLM with .* outputs: give a .*ForSequenceClassification"):
        plan_with(RewardModel(model=policy))
    make_reward_model(tmp_path, labels=3)
    with pytest.raises(ValueError, match="Qwen2ForSequenceClassification with 3 outputs"):
        plan_with(RewardModel(model=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"no model in .*nowhere"):
        plan_with(RewardModel(model=str(tmp_path / "nowhere")))


def test_engines_and_ranks_get_no_judge():
    assert without_functions(config_of("m", BY_URL)).judges == ()


class Processes:
    """Starts processes of a reward model. Process i dies when it has `dies[i]` calls, which all are in flight then."""

    def __init__(self, *dies, error=None, starts=lambda number: None):
        self.dies, self.starts, self.started, self.killed = dies, starts, 0, []
        self.error = error or RayActorError(error_msg="The actor died.\nIt has logs.")

    def __call__(self):
        self.started += 1
        return Process(self, self.started), self._built(self.started)

    async def _built(self, number):
        await asyncio.sleep(0)
        if error := self.starts(number):
            raise error


class Process:
    def __init__(self, processes, number):
        self.processes, self.number, self.calls, self.dead = processes, number, 0, asyncio.Event()
        self.dies = dict(enumerate(processes.dies, 1)).get(number)

    async def ask(self, ask):
        call = recorded(ask)
        if call.method == "start":
            return None
        self.calls += 1
        if self.calls == self.dies:
            self.dead.set()
        if self.dies:
            await self.dead.wait()
            raise self.processes.error
        return 10.0 * self.number + len(call.args[1])

    def kill(self):
        self.processes.killed.append(self.number)


def scores_of(processes, *replies, restarts=3):
    """What a judge's own calls return or raise, made at the same time."""
    judge = RewardModel(model="m", calls=Calls(try_s=30.0, seconds=30.0))
    config, causes = config_of("m", judge, rollout=RolloutConfig(restarts=restarts)), list[str]()

    async def main():
        engine = FrozenEngine(judge, processes, config, causes)
        await engine.start()
        connect(judge, engine.score)
        return await asyncio.gather(*(judge("p", reply) for reply in replies), return_exceptions=True)

    return asyncio.run(main()), causes


@pytest.mark.parametrize("error", [None, EngineLost("vLLM's own process has ended")])
def test_a_process_that_dies_is_started_again_once_and_its_calls_are_made_again(error):
    processes = Processes(3, error=error)
    scores, causes = scores_of(processes, "a", "bb", "ccc")
    assert scores == [21, 22, 23], "the calls in flight were lost too, and the second process has answered all"
    assert (processes.started, processes.killed) == (2, [1])
    assert causes == [f"the judge 'm' (reward model m) was lost: {str(processes.error).splitlines()[0]}"]


def test_one_that_dies_again_and_again_is_an_error_with_its_name_and_never_a_score():
    processes = Processes(2, 2, 2)
    (error, other), causes = scores_of(processes, "a", "bb", restarts=2)
    assert isinstance(error, JudgeError)
    assert isinstance(other, JudgeError)
    said = r"the judge 'm' \(reward model m\) was lost \(The actor died.\)\. It was restarted 2 times already"
    assert re.search(said, str(error))
    assert (processes.started, len(causes)) == (3, 3)


def test_one_that_cannot_be_started_again_is_an_error_with_the_reason():
    processes = Processes(1, starts=lambda number: RuntimeError("no memory left") if number == 2 else None)
    (error,), _ = scores_of(processes, "a")
    assert isinstance(error, JudgeError)
    assert "was lost, and cannot be started again: the judge 'm' (reward model m) did not start" in str(error)


def test_none_is_started_again_after_the_run():
    models, processes = RewardModels(config_of("m")), Processes()
    judge = RewardModel(model="m")

    async def main():
        models.engines = [engine := FrozenEngine(judge, processes, models.config, models.causes)]
        await engine.start()
        assert models.close() == [engine.process]
        await engine.score("p", "r")

    with pytest.raises(JudgeError, match="has ended with the run"):
        asyncio.run(main())
    assert processes.started == 1
