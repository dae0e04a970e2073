"""A run that is killed, killed again and told to stop ends with the weights of the run that was left alone, bit for
bit: real engines, real ranks."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models import make_model
from processes import assert_gone
from runs import finish, start
from trainer.runs.checkpoint import finished

STEPS = 20
FLAGS = f"--steps {STEPS} --save-every 2 --rollout.max-tokens 4 --old-logprobs recompute"


def wait_for(process: subprocess.Popen, folder: Path, what: str, seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not seen():
        assert process.poll() is None, (folder / "terminal.log").read_text()[-3000:]
        assert time.monotonic() < deadline, f"no {what} within 300 s"
        time.sleep(0.02)


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Return once this step is in metrics.jsonl."""
    path = folder / "echo" / "metrics.jsonl"
    wait_for(process, folder, f"step {step}", lambda: path.exists() and f'"step": {step}.0' in path.read_text())


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


@pytest.mark.timeout(900)
def test_kill_9_and_sigterm_at_any_moment_change_nothing_but_the_clock(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", peak=1.0)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process, _ = start(model, whole, *FLAGS.split())
    code, expected, rows = finish(process, whole)
    assert code == 0, (whole / "terminal.log").read_text()[-3000:]
    assert all(row["actor/grad_norm"] > 0 for row in rows[2:]), "nothing was learned that could be lost"

    # In the middle of step 4, after the checkpoint of step 2.
    process, mark = start(model, killed, *FLAGS.split())
    wait_for_step(process, killed, 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    assert_gone(mark)
    # Killed as it writes its next checkpoint, or just after.
    process, mark, at = go_on(model, killed)
    wait_for_step(process, killed, at + 2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    assert_gone(mark)
    # Told to stop, it saves between two checkpoints.
    process, mark, at = go_on(model, killed)
    wait_for_step(process, killed, at + 3)
    os.kill(process.pid, signal.SIGTERM)
    code, summary, _ = finish(process, killed, seconds=60)
    assert (code, summary["status"]) == (143, "interrupted"), (killed / "terminal.log").read_text()[-3000:]
    assert summary["resume"].endswith(f"--resume {killed / 'echo'}")
    assert summary["resume"] in (killed / "terminal.log").read_text()
    stopped = summary["steps"]
    assert (killed / "echo" / "checkpoints" / f"step-{stopped:06d}" / "manifest.json").exists()
    assert_gone(mark)
    process, mark, at = go_on(model, killed)
    assert at == stopped
    code, summary, resumed = finish(process, killed)
    assert code == 0, (killed / "terminal.log").read_text()[-3000:]
    assert_gone(mark)

    # Weights, Adam's moments, generators; then what was sampled; then every number that is no time.
    mine, theirs = learner(killed, STEPS), learner(whole, STEPS)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    final = [load_file(folder / "echo" / "model" / "model.safetensors") for folder in (killed, whole)]
    assert [name for name in final[0] if not torch.equal(final[0][name], final[1][name])] == []
    assert sampled(killed) == sampled(whole)
    assert [row["step"] for row in resumed] == [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for one, other in zip(resumed, rows, strict=True):
        for name in one.keys() & other.keys():
            if name.startswith(("reward/", "actor/", "ledger/", "response_length/", "staleness/", "eval/")):
                assert one[name] == other[name], (one["step"], name)
    assert summary["ledger"] == expected["ledger"] == {"pending": 0, "trained": 8 * STEPS}
    assert summary["tokens"] == expected["tokens"]
    assert summary["eval_before"] == expected["eval_before"]
    assert summary["eval_after"] == expected["eval_after"]
    assert summary["status"] == "finished"
    assert summary["resume"] is None
    runs = {path.name.rpartition("-")[2] for path in (killed / "echo" / "wandb").glob("offline-run-*")}
    assert len(runs) == 1, "one run to W&B"
