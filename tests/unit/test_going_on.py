"""Going on with a run: which recipe may, with which flags, and what its folder and its tracker then say."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from rl.config import Config, TrackingConfig
from rl.loop.progress import Progress
from rl.parity.watch import Watch
from rl.types import Data, Prompt
from trainer import run as trainer_run
from trainer.flags import override
from trainer.launch import launch, option
from trainer.model import files as model_files
from trainer.runs import checkpoint
from trainer.runs.checkpoint import CheckpointError
from trainer.runs.resume import data_digest, resume, state_of, write_history
from trainer.runs.settings import resolved
from trainer.stop import EXIT_CODE, Stop
from trainer.tracking.tracker import RunTracker

CONFIG = Config(name="t", model="m", data=lambda: Data(train=[]), reward=lambda reply: 1.0, steps=6, prompts_per_step=1)
PROGRESS = Progress(version=2, trained_tokens=9, ends={0: "trained", 2: "trained"}, pending=frozenset({1}))
HISTORY = [{"step": 0.0, "eval/x/avg@1": 0.25}, {"step": 1.0, "a": math.nan}, {"step": 2.0, "a": 0.1}]


def saved(run, config=CONFIG, flags=("--steps", "6"), history=HISTORY, progress=PROGRESS):
    settings = resolved(config)
    draft = checkpoint.draft(run, progress.version)
    write_history(draft, history)
    (draft / "learner" / "layer-0000.safetensors").write_bytes(b"weights")
    state = state_of(progress, settings, flags=list(flags), data="d", wandb_id="abc", old_logprobs="rollout")
    return checkpoint.commit(draft, progress.version, state, keep_last=2)


def test_what_was_saved_is_what_a_run_goes_on_with(tmp_path):
    folder = saved(tmp_path)
    resumed = resume(tmp_path)
    assert resumed.progress == PROGRESS
    assert repr(resumed.history) == repr(HISTORY), "with NaN where JSON has null"
    assert resumed.flags == ["--steps", "6"]
    assert (resumed.saved("wandb_id"), resumed.saved("old_logprobs")) == ("abc", "rollout")
    assert resumed.learner == str(folder / "learner")
    assert resumed.check(resolved(CONFIG), CONFIG.steps) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"name": "other"},
            "is of a run with name='t', and this one has 'other': resume with the recipe that wrote it",
        ),
        ({"seed": 1}, "is of a run with seed=0, and this one has 1"),
        ({"prompts_per_step": 2}, "is of a run with prompts_per_step=1, and this one has 2"),
        ({"steps": 1}, r"state\.json has done 2 steps, and steps=1: ask for more"),
    ],
)
def test_a_foreign_run_is_refused_with_the_file_that_says_so(tmp_path, change, says):
    folder = saved(tmp_path)
    config = replace(CONFIG, **change)
    with pytest.raises(CheckpointError, match=says) as refused:
        resume(tmp_path).check(resolved(config), config.steps)
    assert str(folder / "state.json") in str(refused.value)


def test_what_else_changed_is_told(tmp_path):
    saved(tmp_path)
    config = replace(CONFIG, steps=9, output_dir="elsewhere", trainer=replace(CONFIG.trainer, lr=1e-5))
    assert resume(tmp_path).check(resolved(config), 9) == ["steps: 6 -> 9", "trainer.lr: 1e-06 -> 1e-05"]


def test_other_training_prompts_are_refused(tmp_path):
    saved(tmp_path)
    prompts = [Prompt(ordinal=-1, token_ids=[1, 2], task={}), Prompt(ordinal=-1, token_ids=[3], task={})]
    assert data_digest(prompts) != data_digest(prompts[::-1])
    assert data_digest(prompts) != data_digest([replace(prompts[0], token_ids=[1, 2, 3]), *prompts[2:]])
    now = {"size": None, "texts": "", "answers": "", "evals": {}, "code": {}, "model": ""}
    assert resume(tmp_path).check_data("d", now) == []
    with pytest.raises(CheckpointError, match="over other training prompts"):
        resume(tmp_path).check_data(data_digest(prompts), now)


def test_an_impossible_ledger_is_refused(tmp_path):
    saved(tmp_path, progress=replace(PROGRESS, pending=frozenset({1, 2})))
    with pytest.raises(CheckpointError, match=r"state\.json has an impossible ledger: prompt 2 is both"):
        resume(tmp_path)


def test_a_folder_goes_back_to_the_step_of_its_checkpoint(tmp_path):
    saved(tmp_path)
    newer = saved(tmp_path, progress=replace(PROGRESS, version=3))
    (newer / "state.json").write_text("{")
    leftover = checkpoint.draft(tmp_path, 4)
    samples = [{"step": step, "reply": "x"} for step in (-1, 1, 2, 3)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples) + '{"step": 2, "rep')
    (tmp_path / "alerts.jsonl").write_text('{"step": 2, "title": "a"}\n{"step": 3, "title": "b"}\n')
    (tmp_path / "metrics.jsonl").write_text('{"step": 3.0}\n')
    resume(tmp_path).rewind()
    assert [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [-1, 1, 2]
    assert (tmp_path / "alerts.jsonl").read_text() == '{"step": 2, "title": "a"}\n'
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [HISTORY[0], {"step": 1.0, "a": None}, HISTORY[2]]
    assert not leftover.exists()
    assert not newer.exists()
    assert len(list((tmp_path / "checkpoints").glob("damaged-step-000003-*"))) == 1


GAP = "rollout_corr/logprob_abs_diff_mean"


def test_a_tracker_that_goes_on_appends_and_does_not_tell_the_same_alert_again(tmp_path):
    config = replace(CONFIG, dtype="float32")
    settings = {"folder": tmp_path, "config": TrackingConfig(wandb="off"), "name": "t", "settings": {}}
    first = RunTracker(**settings, watch=Watch(config))
    first.log(1, {GAP: 0.0})
    first.log(2, {GAP: 1.0})
    first.close({})
    second = RunTracker(**settings, watch=Watch(config), history=list(first.history))
    second.log(3, {GAP: 1.0})
    second.close({})
    assert [row["step"] for row in second.alerts] == [2]
    assert second.history == [{"step": 1.0, GAP: 0.0}, {"step": 2.0, GAP: 1.0}, {"step": 3.0, GAP: 1.0}]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_resume_is_taken_from_the_command_line_wherever_it_stands():
    def folder(*arguments):
        return option("--resume", arguments, "the folder of a run")

    assert folder("--steps", "3") == (None, ["--steps", "3"])
    assert folder("--resume", "runs/t", "--steps", "3") == ("runs/t", ["--steps", "3"])
    assert folder("--steps", "3", "--resume=runs/t") == ("runs/t", ["--steps", "3"])
    for wrong in (["--resume"], ["--resume", "--steps", "3"]):
        with pytest.raises(ValueError, match="--resume needs the folder of a run"):
            folder(*wrong)


def test_flags_of_the_run_count_and_those_of_now_count_more():
    flags = ["--steps", "6", "--trainer.lr", "1e-3", "--no-save-final", "--steps", "9", "--save-final"]
    config = override(CONFIG, flags)
    assert (config.steps, config.trainer.lr, config.save_final) == (9, 1e-3, True)


def test_the_command_line_says_where_it_goes_on_and_what_is_wrong(tmp_path, monkeypatch, capsys):
    saved(tmp_path, flags=["--steps", "8"])
    newer = saved(tmp_path, progress=replace(PROGRESS, version=3))
    (newer / "history.jsonl").unlink()
    command = ["recipe.py", "--dry-run", "--resume", str(tmp_path), "--model", "no/where", "--steps", "9"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(model_files, "hub_answers", lambda: False)
    with pytest.raises(SystemExit):
        launch(CONFIG)
    said = " ".join(capsys.readouterr().out.split())
    assert f"skipped: {newer}/history.jsonl is missing" in said
    assert "resuming after step 2" in said
    assert "changed steps: 6 -> 9" in said
    assert "changed model: 'm' -> 'no/where'" in said
    assert "OSError: the model 'no/where' is not in the hub's cache, and the hub does not answer within 3 s" in said
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--resume", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit):
        launch(CONFIG)
    assert "CheckpointError: there is no run in" in capsys.readouterr().out


def test_a_state_of_another_model_is_refused_with_the_name_of_its_file_and_tensor(tmp_path):
    from trainer.learner.state import check_shapes

    kinds = ("weights", "exp_avg", "exp_avg_sq")
    save_file({f"{kind}/a.weight": torch.zeros(2, 3) for kind in kinds}, tmp_path / "layer-0000.safetensors")
    check_shapes(tmp_path, {"a.weight": (2, 3)})
    with pytest.raises(ValueError, match=r"layer-0000\.safetensors is of another model: it holds a 'a\.weight' of"):
        check_shapes(tmp_path, {"a.weight": (3, 2)})
    with pytest.raises(ValueError, match=r"holds a 'a\.weight' .* where this model has nothing"):
        check_shapes(tmp_path, {"b.weight": (2, 3)})
    with pytest.raises(ValueError, match=r"it has no 'exp_avg/b\.weight', nor 2 others"):
        check_shapes(tmp_path, {"a.weight": (2, 3), "b.weight": (2, 3)})


def told_to_stop(grace_s, gently=None, saves=True):
    """A task that is told to stop: how it ended, and whether it went on after that."""

    async def main():
        stop = Stop(grace_s)
        stop.listen()
        heard = asyncio.Event()

        async def ask():
            heard.set()

        stop.gently = ask if gently else None
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(120):
            await heard.wait()
        if not saves:
            await asyncio.sleep(120)
        stop.saved()
        assert stop._timer.cancelled(), "what follows the saving may take longer"
        return "saved"

    before = signal.getsignal(signal.SIGTERM)
    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        return "cancelled"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_is_a_question_first_and_an_end_after_the_grace_period():
    assert told_to_stop(60.0, gently=True) == "saved"
    assert told_to_stop(0.1, gently=True, saves=False) == "cancelled"
    assert told_to_stop(60.0) == "cancelled", "nothing to save"
    assert EXIT_CODE == 143


def test_the_changes_of_the_recipes_repository_are_kept_with_the_run(tmp_path, monkeypatch):
    from trainer.runs.code_state import code_state, keep_code

    repository, run = tmp_path / "a repository", tmp_path / "run"
    repository.mkdir()
    run.mkdir()
    recipe = repository / "recipe.py"
    recipe.write_text("a = 1\n")
    monkeypatch.setattr("sys.argv", [str(recipe)])
    assert code_state(repository) == ("", ""), "no repository"
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    first = keep_code(run)
    assert len(first["commit"]) == 40
    assert not first["changed"]
    assert not (run / "code.diff").exists()
    recipe.write_text("a = 2\n")
    assert keep_code(run) == {"commit": first["commit"], "changed": True}
    assert "-a = 1\n+a = 2" in (run / "code.diff").read_text()
    monkeypatch.setenv("PATH", "/nowhere")
    assert code_state(repository) == ("", ""), "no git"


def test_the_doctor_hands_its_first_groups_to_a_new_run_alone(monkeypatch):
    class Seen(Exception):
        """What the doctor was given to hand them to."""

    async def examine(cluster, learner, prepared, version, into):
        raise Seen(into)

    monkeypatch.setattr(trainer_run, "examine_engines", examine)
    for resumed, given in ((None, "rollouts"), (SimpleNamespace(saved=lambda name: None), None)):
        here = SimpleNamespace(config=CONFIG, cluster=None, prepared=None, progress=PROGRESS, resumed=resumed)
        with pytest.raises(Seen) as seen:
            asyncio.run(trainer_run.Run._check(here, "learner", "rollouts"))
        assert seen.value.args == (given,)
