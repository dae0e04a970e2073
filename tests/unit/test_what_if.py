"""Objectives on one recorded step: verdicts by hand, the record's round trip, and the command."""

import asyncio
import json
import math
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import save_file

from rl.config import Config
from rl.contract.what_if import cosines, evaluate_objective
from rl.objectives import CISPO, GRPO, GSPO, PPO
from rl.protocols import SyncReport
from rl.types import Batch, Data, PolicyOutput
from trainer.commands.load import load_objective
from trainer.commands.what_if import what_if
from trainer.runs.records import Record, Recorder, load, save, spec_of

MASK = torch.tensor([[True, True], [True, False]])
OLD = torch.tensor([[-1.0, -2.0], [-1.5, 0.0]])


def record_of(ratio):
    """Two samples of one group with rewards 1 and 0; the policy has moved by `ratio` since."""
    batch = Batch(
        input_ids=torch.tensor([[5, 6, 7], [5, 8, 0]]),
        mask=MASK,
        rollout_logprobs=OLD,
        versions=torch.zeros(2, 2, dtype=torch.long),
        rewards=torch.tensor([1.0, 0.0]),
        group_ids=torch.tensor([3, 3]),
        old_logprobs=OLD,
    )
    now = torch.where(MASK, OLD + torch.tensor(ratio).log(), 0.0)
    return Record(batch=batch, policy=PolicyOutput(logprobs=now, entropy=torch.ones(2, 2)), horizon=4, objective="GRPO")


def verdict(objective, ratio):
    record = record_of(ratio)
    return evaluate_objective("x", objective, record.batch, record.policy, record.horizon)


def test_a_verdict_by_hand():
    got = verdict(GRPO(divide_by_std=False), [[1.5, 1.1], [1.0, 1.0]])
    # Advantages 1/2 and -1/2; the first token is clipped; an average over 3 tokens.
    assert got.loss == pytest.approx((-0.5 * 1.2 - 0.5 * 1.1 + 0.5) / 3)
    assert got.gradient.tolist() == [[0.0, pytest.approx(-0.55 / 3)], [pytest.approx(0.5 / 3), 0.0]]
    assert got.grad_norm == pytest.approx(math.hypot(0.55, 0.5) / 3)
    assert (got.clip_low, got.clip_high) == (0.0, pytest.approx(1 / 3))
    # Weights 0, 1.1 and 1 of three live tokens.
    assert got.ess == pytest.approx(2.1**2 / (3 * (1.1**2 + 1)))
    assert got.effective_tokens == pytest.approx(1.05**2 / (0.55**2 + 0.5**2))


def test_where_nothing_moved_all_agree_but_for_their_averaging():
    same = [[1.0, 1.0], [1.0, 1.0]]
    grpo, cispo, gspo = (verdict(o, same) for o in (GRPO(), CISPO(), GSPO()))
    agree = cosines([grpo, cispo, gspo])
    assert agree[0, 1] == pytest.approx(1.0)
    # Over sequences the single token of the second row counts twice: (1, 1, 1) against (1/2, 1/2, 1).
    assert agree[0, 2] == pytest.approx(2 / math.sqrt(3 * 1.5))
    assert grpo.ess == pytest.approx(1.0)
    assert grpo.effective_tokens == pytest.approx(3.0)


def test_a_record_without_what_an_objective_reads_is_refused():
    record = record_of([[1.0, 1.0], [1.0, 1.0]])
    for objective, lacks in ((PPO(), "values"), (GRPO(kl_coef=0.1), "ref_logprobs")):
        with pytest.raises(ValueError, match=f"x reads {lacks}, which this record does not have"):
            evaluate_objective("x", objective, record.batch, record.policy, 4)


def same(a, b):
    return all(
        (x is None) == (y is None) and (x is None or torch.equal(x, y))
        for x, y in ((getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    )


def test_a_record_reads_back_as_it_was_written(tmp_path):
    record = record_of([[1.5, 1.1], [1.0, 1.0]])
    save(record, tmp_path / "step.safetensors")
    back = load(tmp_path / "step.safetensors")
    assert same(back.batch, record.batch)
    assert same(back.policy, record.policy)
    assert (back.horizon, back.objective) == (4, "GRPO")


def test_a_file_of_another_kind_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "README.md").write_text("# read me")
    for name in ("model.safetensors", "README.md"):
        with pytest.raises(ValueError, match=rf"{name} is no recorded batch .*--record-batches 1"):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="--record-batches 1"):
        load(tmp_path / "nothing.safetensors")


class Ranks:
    """A learner whose log-probabilities count its steps."""

    def __init__(self, version=0):
        self.published, self.steps, self.version = asyncio.Lock(), 0, version

    async def step(self, batch):
        await self.published.acquire()
        self.steps += 1
        return {"actor/loss": 0.5}

    async def publish(self, version):
        self.published.release()
        return SyncReport(seconds=0.0, pause_seconds=0.0, bytes=version, verified=True)

    async def answer(self, batch):
        now = torch.full(batch.mask.shape, float(-1 - self.steps))
        return PolicyOutput(logprobs=now, entropy=torch.zeros(batch.mask.shape), values=now + 10.0)

    async def reference_logprobs(self, batch):
        return torch.full(batch.mask.shape, -9.0)


def test_every_nth_step_is_kept_with_what_the_trainer_said_before_and_after(tmp_path):
    ranks = Ranks()
    config = Config(name="t", model="m", data=lambda: Data(train=[]), reward=len, record_batches=2)
    recorder = Recorder(ranks, tmp_path / "batches", config, lambda *alert: None)
    batch = replace(record_of([[1.0, 1.0], [1.0, 1.0]]).batch, old_logprobs=None)

    async def train():
        for step in range(1, 5):
            assert await recorder.step(batch) == {"actor/loss": 0.5}
            assert (await recorder.publish(step)).bytes == step

    asyncio.run(train())
    assert sorted(p.name for p in (tmp_path / "batches").iterdir()) == ["step-2.safetensors", "step-4.safetensors"]
    second = load(tmp_path / "batches" / "step-2.safetensors")
    assert (float(second.batch.old_logprobs.max()), float(second.policy.logprobs.max())) == (-2.0, -3.0)
    assert (float(second.batch.values.max()), float(second.policy.values.max())) == (8.0, 7.0)
    assert second.objective == "GSPO"
    # So that a critic, or a KL in the reward, can be judged too.
    for objective in (PPO(), GRPO(kl_coef=0.1, kl_in="reward", kl_estimator="k1")):
        assert evaluate_objective("x", objective, second.batch, second.policy, 4).gradient.isfinite().all()


def test_records_that_cannot_be_written_are_one_alert_and_training_continues(tmp_path):
    (tmp_path / "batches").write_text("a file where the folder should be")
    alerts = []
    config = Config(name="t", model="m", data=lambda: Data(train=[]), reward=len, record_batches=1)
    recorder = Recorder(Ranks(), tmp_path / "batches", config, lambda *alert: alerts.append(alert))
    batch = replace(record_of([[1.0, 1.0]]).batch, old_logprobs=None)

    async def train():
        for step in (1, 2):
            assert await recorder.step(batch) == {"actor/loss": 0.5}
            await recorder.publish(step)

    asyncio.run(train())
    assert [alert[:2] for alert in alerts] == [(1, "the batch could not be recorded")]


def test_after_a_resume_records_keep_the_numbers_of_their_steps(tmp_path):
    ranks = Ranks(version=5)
    config = Config(name="t", model="m", data=lambda: Data(train=[]), reward=len, record_batches=2)
    recorder = Recorder(ranks, tmp_path, config, lambda *alert: None)
    asyncio.run(recorder.step(replace(record_of([[1.0, 1.0]]).batch, old_logprobs=None)))
    assert [p.name for p in tmp_path.iterdir()] == ["step-6.safetensors"]


@pytest.mark.slow
def test_the_command_compares_and_leaves_a_table_a_plot_and_json(tmp_path, capsys):
    path = tmp_path / "step-7.safetensors"
    save(record_of([[1.5, 1.1], [1.0, 0.9]]), path)
    assert what_if([str(path), "--objectives", "grpo,GSPO,cispo"]) == 0
    said = capsys.readouterr().out
    assert "step-7.safetensors, recorded with GRPO" in said
    found = json.loads((tmp_path / "what-if-step-7.json").read_text())
    assert list(found["objectives"]) == ["grpo", "GSPO", "cispo"]
    assert found["objectives"]["grpo"]["clip_high"] == pytest.approx(1 / 3)
    assert found["cosine"][0][0] == pytest.approx(1.0)
    assert (tmp_path / "what-if-step-7.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"no objective 'qspo'; there are cispo, dapo.*FILE\.py:CLASS"):
        what_if([str(path), "--objectives", "qspo"])


# -- the command's input -----------------------------------------------------------------------------------------------

MINE = """
from dataclasses import dataclass
from rl.objectives import GRPO


@dataclass(frozen=True, kw_only=True)
class Mine(GRPO):
    factor: float = 1.0

    def loss(self, policy, batch, advantages):
        return super().loss(policy, batch, self.factor * advantages)
"""


def recorded(folder, *steps, spec="GRPO"):
    for step in steps:
        save(replace(record_of([[1.5, 1.1], [1.0, 0.9]]), spec=spec), folder / f"step-{step}.safetensors")
    return folder / f"step-{steps[0]}.safetensors"


def judged(folder, name):
    return json.loads((folder / f"what-if-{name}.json").read_text())


def test_settings_may_be_written_with_an_objective(tmp_path):
    path = recorded(tmp_path, 1)
    assert what_if([str(path), "--objectives", "grpo(clip_high=0.5, divide_by_std=False),grpo"]) == 0
    found = judged(tmp_path, "step-1")["objectives"]
    assert list(found) == ["grpo(clip_high=0.5, divide_by_std=False)", "grpo"]
    assert (found["grpo(clip_high=0.5, divide_by_std=False)"]["clip_high"], found["grpo"]["clip_high"]) == (
        0.0,
        pytest.approx(1 / 3),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grpo(0.28)", r"grpo\(0.28\): write settings by name, as plain values: grpo\(clip_high=0.28\)"),
        ("grpo(clip_high=open('x'))", "write settings by name, as plain values"),
        ("grpo(clip=0.28)", "GRPO has no clip; it has average_over, clip_high, clip_low"),
    ],
)
def test_settings_in_another_form_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        what_if([str(recorded(tmp_path, 1)), "--objectives", text])


def test_two_classes_of_one_name_are_two_objectives(tmp_path):
    for folder, factor in (("a", "1.0"), ("b", "2.0")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(MINE.replace("factor: float = 1.0", f"factor: float = {factor}"))
    (tmp_path / "third.py").write_text(MINE)
    asked = [f"{tmp_path}/{name}:Mine" for name in ("a/mine.py", "b/mine.py", "third.py")]
    assert what_if([str(recorded(tmp_path, 1)), "--objectives", ",".join([*asked, "grpo"])]) == 0
    found = judged(tmp_path, "step-1")["objectives"]
    assert list(found) == [asked[0], asked[1], "third.py:Mine", "grpo"]
    assert found[asked[1]]["grad_norm"] == pytest.approx(2 * found[asked[0]]["grad_norm"])


def test_the_run_s_own_objective_is_judged_as_it_was_set(tmp_path, capsys):
    path = recorded(tmp_path, 1, spec=spec_of(GRPO(clip_high=0.6)))
    assert what_if([str(path), "--objectives", "grpo,gspo"]) == 0
    found = judged(tmp_path, "step-1")["objectives"]
    assert list(found) == ["GRPO (the run's)", "grpo", "gspo"]
    assert found["GRPO (the run's)"]["clip_high"] == 0.0
    lost = recorded(tmp_path, 2, spec=f"{tmp_path}/gone.py:Mine")
    assert what_if([str(lost), "--objectives", "grpo"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the run's own objective" in said
    assert "is left out: there is no file" in said


def test_an_objective_is_made_again_from_its_record(tmp_path):
    (tmp_path / "kept.py").write_text(MINE)
    for made in (GRPO(clip_high=0.28, dual_clip=3.0), PPO(), load_objective(f"{tmp_path}/kept.py:Mine(factor=0.5)")):
        again = load_objective(spec_of(made))
        assert spec_of(again) == spec_of(made)
        assert vars(again) == vars(made)


@pytest.mark.slow
def test_no_comparison_is_overwritten(tmp_path):
    path = recorded(tmp_path, 1)
    for _ in range(2):
        assert what_if([str(path), "--objectives", "grpo,gspo"]) == 0
    assert what_if([str(path), "--objectives", "grpo,cispo"]) == 0
    assert list(judged(tmp_path, "step-1")["objectives"]) == ["grpo", "gspo"]
    assert list(judged(tmp_path, "step-1-3")["objectives"]) == ["grpo", "cispo"]
    assert (tmp_path / "what-if-step-1-3.png").is_file()


@pytest.mark.slow
def test_a_folder_stands_for_all_of_its_steps(tmp_path):
    (tmp_path / "run" / "batches").mkdir(parents=True)
    recorded(tmp_path / "run" / "batches", 2, 10)
    assert what_if([str(tmp_path / "run"), "--objectives", "grpo,cispo"]) == 0
    found = judged(tmp_path / "run" / "batches", "step-2-to-step-10")
    assert list(found["steps"]) == ["step-2", "step-10"]
    one = found["steps"]["step-2"]
    # Both steps are the same, so their mean is each of them.
    assert found["objectives"]["cispo"]["loss"] == pytest.approx(one["objectives"]["cispo"]["loss"])
    assert found["cosine"][0][1] == pytest.approx(one["cosine"][0][1])
    with pytest.raises(FileNotFoundError, match=r"holds no step-N.safetensors; `--record-batches 1`"):
        what_if([str(tmp_path)])
