"""A run that is killed, killed again and told to stop ends with the weights of the run that was left alone, bit for
bit: real engines, real ranks."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from processes import assert_gone
from runs import finish, printed, start, wait_for, wait_for_step
from trainer.runs.checkpoint import finished

STEPS = 20
CUT = "--rollout.top-k 20 --rollout.top-p 0.9 --temperature 0.9"
"""On CPU the trainer finds the kept tokens from its own logits."""
FLAGS = f"--steps {STEPS} --save-every 2 --rollout.max-tokens 4 --old-logprobs recompute {CUT}".split()


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


@pytest.mark.timeout(1500)
def test_kill_9_and_sigterm_at_any_moment_change_nothing_but_the_clock(echo_model: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    process, _ = start(echo_model, whole, *FLAGS)
    code, expected, rows = finish(process, whole)
    assert code == 0, printed(whole)
    assert all(row["actor/grad_norm"] > 0 for row in rows[2:]), "nothing was learned that could be lost"
    # Truncated sampling: the trainer renormalises over exactly what the engine kept.
    assert max(row["rollout_corr/logprob_abs_diff_mean"] for row in rows) <= 1e-5
    process, mark = start(echo_model, killed, *FLAGS)
    # Past the checkpoint of step 2, and as it writes its next one or in the middle of a step.
    wait_for_step(process, killed, 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert_gone(mark)
    # Told to stop, it saves between two checkpoints.
    process, mark, at = go_on(echo_model, killed)
    wait_for_step(process, killed, at + 3)
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
    code, summary, resumed = finish(process, killed)
    assert code == 0, printed(killed)
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
