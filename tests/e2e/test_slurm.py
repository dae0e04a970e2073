"""Real SLURM, two nodes on one machine: a batch job that is struck saves, is queued again, and continues."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from models import make_model
from rig import Rig, lacking, rig
from runs import RECIPE, every_prompt_was_trained_once

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())
STRIKES = int(os.environ.get("UNISON_STRIKES", "30"))
STEPS = 8


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("rig")) as one:
        yield one


class Job:
    """The echo recipe as a job, written by `unison launch` and sent by `sbatch`."""

    def __init__(self, nodes: Rig, name: str, partition: str = "low", engines: int = 2) -> None:
        self.nodes, self.folder = nodes, nodes.folder / name
        self.folder.mkdir()
        model = nodes.folder / "model"
        if not model.exists():
            model.mkdir()
            make_model(model, peak=1.0)
        command = [sys.executable, "-c", "from trainer.cli import main; main()", "launch", "slurm", str(RECIPE)]
        command += ["--nodes", "2", "--gpus-per-node", "0", "--partition", partition, "--cpus-per-node", "2"]
        command += ["--interface", "eth0", "--out", str(self.folder / "job.sbatch"), "--", "--model", str(model)]
        command += ["--output-dir", str(self.folder / "runs"), "--device", "cpu", "--steps", str(STEPS)]
        command += ["--save-every", "1", "--tracking.wandb", "off", "--rollout.engines", str(engines)]
        command += ["--doctor", "off", "--group-size", "4", "--prompts-per-step", "2", "--no-save-final"]
        command += ["--tracking.samples-per-step", "8"]
        written = subprocess.run(command, capture_output=True, text=True, cwd=self.folder)
        assert written.returncode == 0, written.stdout + written.stderr
        self.id = nodes.run("sbatch", "--parsable", str(self.folder / "job.sbatch"), cwd=self.folder)

    @property
    def run(self) -> Path:
        """The run's folder; the newest, where an attempt died before its first checkpoint."""
        made = sorted((self.folder / "runs" / f"job-{self.id}").glob("echo*"), key=lambda path: path.stat().st_mtime)
        return made[-1] if made else self.folder / "runs" / f"job-{self.id}" / "echo"

    def step(self) -> int:
        """Steps that are done."""
        path = self.run / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
        return int(rows[-1]["step"]) if rows else 0

    def reaches(self, step: int) -> None:
        """Wait for the end of a step."""

        def reached() -> bool:
            assert self.nodes.state(self.id)["JobState"] in ("PENDING", "RUNNING"), self.said()[-3000:]
            return self.step() >= step

        self.nodes.wait(f"step {step}", reached)

    def said(self) -> str:
        """What the script printed."""
        with suppress(OSError):
            return (self.folder / "runs" / "slurm" / f"slurm-{self.id}.out").read_text()
        return ""

    def ends(self, state: str = "COMPLETED") -> None:
        """Wait for its end; queued again it need not wait for its turn."""

        def ended() -> bool:
            now = self.nodes.state(self.id)
            if now["JobState"] == "PENDING" and now["Reason"] == "BeginTime":
                with suppress(AssertionError):
                    self.nodes.run("scontrol", "update", f"JobId={self.id}", "StartTime=now")
            if now["JobState"] in ("FAILED", "CANCELLED", "NODE_FAIL", "COMPLETED"):
                assert now["JobState"] == state, self.said()[-3000:]
                return True
            return False

        self.nodes.wait(f"end of job {self.id}", ended)


@pytest.mark.nightly
@pytest.mark.serial
@pytest.mark.timeout(3600)
def test_a_job_that_slurm_asks_to_end_saves_is_queued_again_and_continues(nodes: Rig) -> None:
    job = Job(nodes, "asked")
    job.reaches(2)
    nodes.run("scancel", "--signal=TERM", "--batch", job.id)
    nodes.wait("the second attempt", lambda: nodes.state(job.id)["Restarts"] == "1")
    assert "SIGTERM: the run saves" in job.said()
    assert "attempt 0 ended with 143" in job.said()
    job.ends()
    assert "resuming after step" in job.said()
    assert json.loads((job.run / "summary.json").read_text())["status"] == "finished"
    every_prompt_was_trained_once(job.run, prompts=2 * STEPS, samples=4)
    # No process is left on the nodes. The folder of one that SLURM killed is claimed again by the next cluster.
    assert set(nodes.run("srun", "-N2", "bash", "-c", "pgrep -c raylet || true").split()) == {"0"}


@pytest.mark.nightly
@pytest.mark.serial
@pytest.mark.timeout(6 * 3600)
def test_struck_at_random_every_job_ends_and_no_prompt_is_lost(nodes: Rig) -> None:
    """30 jobs, each struck once: UNISON_STRIKES=3 makes three."""
    draw, resumed, hung = random.Random(0), 0, []
    strikes = ["term", "cancel", "preempt", "requeue", "node"]
    for number in range(STRIKES):
        strike, at = strikes[number % len(strikes)], draw.randint(1, STEPS - 3)
        job = Job(nodes, f"strike-{number}-{strike}")
        job.reaches(at)
        if strike == "term":
            nodes.run("scancel", "--signal=TERM", "--batch", job.id)
        elif strike == "cancel":
            nodes.run("scancel", job.id)
        elif strike == "preempt":
            other = ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--wrap", "srun true"]
            nodes.run(*other, cwd=job.folder)
        elif strike == "requeue":
            nodes.run("scontrol", "requeue", job.id)
        else:
            nodes.kill_node("n2")
            nodes.wait("the lost node", lambda: "n2" in nodes.run("sinfo", "-h", "-t", "down", "-o", "%N"))
            nodes.revive("n2")
        job.ends("CANCELLED" if strike == "cancel" else "COMPLETED")
        if strike == "cancel":
            # A user who cancels wants no second attempt; what was saved can be resumed.
            assert list((job.run / "checkpoints").glob("step-*")), "nothing to resume from"
        else:
            resumed += "resuming after step" in job.said()
            every_prompt_was_trained_once(job.run, prompts=2 * STEPS, samples=4)
    assert not hung
    assert resumed >= (STRIKES - len(range(1, STRIKES, len(strikes)))) * 5 // 6
