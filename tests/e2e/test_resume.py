"""A run that is left alone learns; one that is killed or told to stop ends with the same weights, bit for bit: real
engines, real ranks."""

import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from processes import assert_gone
from runs import finish, printed, start, wait_for, wait_for_step
from trainer.runs.checkpoint import finished

STEPS = 40
FLAGS = f"--steps {STEPS} --save-every 2 --old-logprobs recompute".split()
SHORT = 14
"""Steps of the killed run: it is compared with the first ones of the run that was left alone."""
ALONE = ["--doctor", "off", "--tracking.wandb", "off"]
"""What the run that was left alone has, and no other needs."""
CUT = ["--rollout.max-tokens", "4", "--rollout.top-k", "20", "--rollout.top-p", "0.9", "--temperature", "0.9"]
"""On CPU the trainer finds the kept tokens from its own logits."""


@dataclass(frozen=True)
class Whole:
    """A run that was left alone."""

    folder: Path
    summary: dict
    rows: list[dict]
    mark: str


def run_whole(model: Path, folder: Path, *flags: str) -> Whole:
    process, mark = start(model, folder, *FLAGS, *flags)
    code, summary, rows = finish(process, folder)
    assert code == 0, printed(folder)
    return Whole(folder, summary, rows, mark)


@pytest.fixture(scope="module")
def whole(echo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return run_whole(echo_model, tmp_path_factory.mktemp("whole"), "--keep-last", str(STEPS))


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


def sampled(folder: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (folder / "echo" / "samples.jsonl").read_text().splitlines()]
    return [(row["step"], row["prompt_ordinal"], row["prompt"], row["reply"], row["reward"]) for row in rows]


def test_a_users_objective_learns_and_every_step_agrees_with_the_engine(whole: Whole) -> None:
    summary, rows = whole.summary, whole.rows
    assert summary["status"] == "finished"
    assert len(rows) == STEPS
    assert sum(row["reward/mean"] for row in rows[:3]) / 3 < 0.4
    assert sum(row["reward/mean"] for row in rows[-5:]) / 5 > 0.8
    assert summary["eval_after"]["eval/digits/avg@4"] - summary["eval_before"]["eval/digits/avg@4"] > 0.4
    # The engine had each step's new weights, and both sides say the same, at every step.
    assert max(row["rollout_corr/logprob_abs_diff_mean"] for row in rows) <= 1e-5
    assert [row["weight_sync/version"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["weight_sync/verified"] == 1.0
    assert all(row["staleness/max"] == 0 for row in rows)
    assert rows[3]["actor/move"] == 0.0  # one step per batch: the current policy is the old one
    assert summary["ledger"] == {"pending": 0, "trained": 8 * STEPS}
    run = whole.folder / "echo"
    for name in ("config.json", "samples.jsonl", "curves.png", "model/model.safetensors", "model/tokenizer.json"):
        assert (run / name).stat().st_size > 0, name
    assert list(run.glob("wandb/offline-run-*")), "W&B must have recorded the run offline"
    assert_gone(whole.mark)


@pytest.mark.timeout(1500)
def test_kill_9_changes_nothing_but_the_clock(echo_model: Path, whole: Whole, tmp_path: Path) -> None:
    process, mark = start(echo_model, tmp_path, *FLAGS, *ALONE, "--steps", str(SHORT))
    # Past the checkpoint of step 2, and as it writes its next one or in the middle of a step.
    wait_for_step(process, tmp_path, 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert_gone(mark)
    process, mark, _ = go_on(echo_model, tmp_path)
    assert_the_same(process, mark, tmp_path, whole, SHORT)


@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_sigterm_changes_nothing_but_the_clock_where_sampling_is_truncated(echo_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    folder.mkdir()
    whole = run_whole(echo_model, folder, *CUT)
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
    assert_the_same(process, mark, killed, whole, STEPS)
    runs = {path.name.rpartition("-")[2] for path in (killed / "echo" / "wandb").glob("offline-run-*")}
    assert len(runs) == 1, "one run to W&B"


def assert_the_same(process: subprocess.Popen, mark: str, killed: Path, whole: Whole, steps: int) -> None:
    """The resumed run ends well, with what the run that was left alone had after so many steps."""
    rows = whole.rows[:steps]
    code, summary, resumed = finish(process, killed)
    assert code == 0, printed(killed)
    assert_gone(mark)
    # Weights, Adam's moments, generators; then what was sampled; then every number that is no time.
    mine, theirs = learner(killed, steps), learner(whole.folder, steps)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert sampled(killed) == [sample for sample in sampled(whole.folder) if sample[0] <= steps]
    assert [row["step"] for row in resumed] == [row["step"] for row in rows] == list(range(1, steps + 1))
    for one, other in zip(resumed, rows, strict=True):
        for name in one.keys() & other.keys():
            if name.startswith(("reward/", "actor/", "ledger/", "response_length/", "staleness/")):
                assert one[name] == other[name], (one["step"], name)
    assert summary["ledger"] == {"pending": 0, "trained": 8 * steps}
    assert summary["eval_before"] == whole.summary["eval_before"]
    assert summary["status"] == "finished"
    assert summary["resume"] is None
    if steps < STEPS:
        return
    final = [load_file(folder / "echo" / "model" / "model.safetensors") for folder in (killed, whole.folder)]
    assert [name for name in final[0] if not torch.equal(final[0][name], final[1][name])] == []
    assert summary["ledger"] == whole.summary["ledger"]
    assert summary["tokens"] == whole.summary["tokens"]
    assert summary["eval_after"] == whole.summary["eval_after"]
