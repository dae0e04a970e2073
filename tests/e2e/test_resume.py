"""A run learns; one that is killed or stopped goes on with the same weights, bit for bit: real engines, real ranks."""

import json
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from processes import assert_gone
from recorded import figures_agree
from runs import finish, printed, start, wait_for, wait_for_step
from trainer.runs.checkpoint import finished

STEPS = 40
FLAGS = f"--steps {STEPS} --save-every 4 --keep-last {STEPS} --old-logprobs recompute".split()
SEEN = 9
"""The step in which the killed run is seen last, past the checkpoints of steps 4 and 8."""
CUT = ["--rollout.max-tokens", "4", "--rollout.top-k", "20", "--rollout.top-p", "0.9", "--temperature", "0.9"]
"""On CPU the trainer finds the kept tokens from its own logits."""


@dataclass(frozen=True)
class Run:
    """A run that came to its end."""

    folder: Path
    summary: dict
    rows: list[dict]
    mark: str


@dataclass(frozen=True)
class Killed:
    """What a run left that was killed after step SEEN, and the same run, resumed after step 4."""

    learner: dict[str, torch.Tensor]
    """Weights, moments and generators after step 8."""
    rows: list[dict]
    samples: list[tuple]
    resumed: Run


def finished_run(process: subprocess.Popen, mark: str, folder: Path) -> Run:
    code, summary, rows = finish(process, folder)
    assert code == 0, printed(folder)
    return Run(folder, summary, rows, mark)


@pytest.fixture(scope="module")
def killed(echo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    process, mark = start(echo_model, folder, *FLAGS)
    wait_for_step(process, folder, SEEN)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert_gone(mark)
    rows = [json.loads(row) for row in (folder / "echo" / "metrics.jsonl").read_text().splitlines()[1 : SEEN + 1]]
    held, samples = learner(folder, 8), sampled(folder, SEEN)
    # As if it had been killed before it saved again: what it did afterwards is what the resumed run must do again.
    for later in finished(folder / "echo" / "checkpoints")[1:]:
        shutil.rmtree(later)
    process, mark, at = go_on(echo_model, folder)
    assert at == 4
    return Killed(held, rows, samples, finished_run(process, mark, folder))


def go_on(model: Path, folder: Path) -> tuple[subprocess.Popen, str, int]:
    """Resume the run, and return once the steps after its checkpoint are taken back; the checkpoint's step too.

    Flags need not be said again.
    """
    path, at = folder / "echo" / "metrics.jsonl", saved(folder)
    before = path.stat().st_ino
    process, mark = start(model, folder, "--resume", str(folder / "echo"))
    wait_for(process, folder, "new file of metrics", lambda: path.stat().st_ino != before)
    assert f"resuming after step {at}" in (folder / "terminal.log").read_text()
    return process, mark, at


def saved(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return int(finished(folder / "echo" / "checkpoints")[-1].name.removeprefix("step-"))


def learner(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found = {}
    for path in (folder / "echo" / "checkpoints" / f"step-{step:06d}" / "learner").glob("*.safetensors"):
        found |= load_file(path)
    return found


def sampled(folder: Path, steps: int) -> list[tuple]:
    """The samples of the first steps."""
    rows = [json.loads(line) for line in (folder / "echo" / "samples.jsonl").read_text().splitlines()]
    columns = ("step", "prompt_ordinal", "prompt", "reply", "reward")
    return [tuple(row[name] for name in columns) for row in rows if row["step"] <= steps]


@pytest.mark.timeout(1500)
def test_a_users_objective_learns_and_every_step_agrees_with_the_engine(killed: Killed) -> None:
    summary, rows = killed.resumed.summary, killed.resumed.rows
    assert summary["status"] == "finished"
    assert len(rows) == STEPS
    assert sum(row["reward/mean"] for row in rows[:3]) / 3 < 0.4
    assert sum(row["reward/mean"] for row in rows[-5:]) / 5 > 0.8
    assert summary["eval_after"]["eval/digits/avg@4"] - summary["eval_before"]["eval/digits/avg@4"] > 0.4
    figures_agree(killed.resumed.folder / "echo", rows)
    # The engine had each step's new weights, and both sides say the same, at every step.
    assert max(row["rollout_corr/logprob_abs_diff_mean"] for row in rows) <= 1e-5
    assert [row["weight_sync/version"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["weight_sync/verified"] == 1.0
    assert all(row["staleness/max"] == 0 for row in rows)
    assert rows[3]["actor/move"] == 0.0  # one step per batch: the current policy is the old one
    assert summary["ledger"] == {"pending": 0, "trained": 8 * STEPS}
    run = killed.resumed.folder / "echo"
    for name in ("config.json", "samples.jsonl", "curves.png", "model/model.safetensors", "model/tokenizer.json"):
        assert (run / name).stat().st_size > 0, name
    assert list(run.glob("wandb/offline-run-*")), "W&B must have recorded the run offline"
    spans = [json.loads(line) for line in (run / "timeline.jsonl").read_text().splitlines() if line.startswith("{")]
    evaluation, group = (next(s for s in spans if s["name"] == name) for name in ("evaluation", "group 0"))
    assert group["ts"] < evaluation["ts"] + evaluation["dur"], "the first group waited for the start model's evaluation"
    assert_gone(killed.resumed.mark)


@pytest.mark.timeout(1500)
def test_kill_9_changes_nothing_but_the_clock(killed: Killed) -> None:
    folder = killed.resumed.folder
    assert {sample[0] for sample in killed.samples} == set(range(1, SEEN + 1))
    assert_equal(killed.learner, learner(folder, 8))
    assert_equal_rows(killed.rows, killed.resumed.rows[:SEEN])
    assert killed.samples == sampled(folder, SEEN)
    # It moved in these steps, or nothing could be lost.
    assert all(row["actor/grad_norm"] > 0 for row in killed.rows[4:])


@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_sigterm_changes_nothing_but_the_clock_where_sampling_is_truncated(echo_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    folder.mkdir()
    whole = finished_run(*start(echo_model, folder, *FLAGS, *CUT), folder)
    assert all(row["actor/grad_norm"] > 0 for row in whole.rows[2:]), "nothing was learned that could be lost"
    # The trainer renormalises over exactly what the engine kept.
    assert max(row["rollout_corr/logprob_abs_diff_mean"] for row in whole.rows) <= 1e-5
    killed = tmp_path / "killed"
    killed.mkdir()
    process, mark = start(echo_model, killed, *FLAGS, *CUT)
    # Told to stop, it saves between two checkpoints.
    wait_for_step(process, killed, 5)
    os.kill(process.pid, signal.SIGTERM)
    code, summary, _ = finish(process, killed)
    assert (code, summary["status"]) == (143, "interrupted"), printed(killed)
    assert summary["resume"].endswith(f"--resume {killed / 'echo'}")
    assert summary["resume"] in (killed / "terminal.log").read_text()
    stopped = summary["steps"]
    assert (killed / "echo" / "checkpoints" / f"step-{stopped:06d}" / "manifest.json").exists()
    assert_gone(mark)
    process, mark, at = go_on(echo_model, killed)
    assert at == stopped
    resumed = finished_run(process, mark, killed)
    assert_gone(mark)
    assert_equal(learner(killed, STEPS), learner(folder, STEPS))
    assert sampled(killed, STEPS) == sampled(folder, STEPS)
    assert_equal_rows(resumed.rows, whole.rows)
    assert_equal(*(load_file(one / "echo" / "model" / "model.safetensors") for one in (killed, folder)))
    for name in ("eval_before", "eval_after", "ledger", "tokens", "status", "resume"):
        assert resumed.summary[name] == whole.summary[name], name
    assert (whole.summary["status"], whole.summary["resume"]) == ("finished", None)
    runs = {path.name.rpartition("-")[2] for path in (killed / "echo" / "wandb").glob("offline-run-*")}
    assert len(runs) == 1, "one run to W&B"


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_equal_rows(rows: list[dict], others: list[dict]) -> None:
    """Every number that is no time."""
    assert [row["step"] for row in rows] == [row["step"] for row in others] == list(range(1, len(rows) + 1))
    for one, other in zip(rows, others, strict=True):
        for name in one.keys() & other.keys():
            if name.startswith(("reward/", "actor/", "ledger/", "response_length/", "staleness/")):
                assert one[name] == other[name], (one["step"], name)
