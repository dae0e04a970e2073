"""Real SLURM, two nodes on one machine: a batch job that is struck saves, is queued again, and continues.

UNISON_STRUCK=runs/struck.jsonl UNISON_STRIKES=30 .venv/bin/python -m pytest tests/e2e/test_slurm.py -m '' -k struck -s

makes the strikes that the file lacks, one row each, and prints the sum of all. A call with fewer strikes, or one that
is ended, is continued by the next.
"""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from models import make_model
from rig import Rig, lacking, rig
from runs import RECIPE, every_prompt_has_one_state, every_prompt_was_trained_once
from trainer.runs.checkpoint import finished

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())
STRIKES = int(os.environ.get("UNISON_STRIKES", "30"))
KINDS = ["term", "preempt", "requeue", "node", "everyone", "preempt", "term", "node", "requeue", "cancel"]
"""SIGTERM to the script, a job of more priority, `scontrol requeue`, a node without current, SIGTERM to every process,
`scancel`."""
STEPS = 60
HANGS_S = 60.0


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("rig")) as one:
        yield one


def changes(folder: Path) -> Iterator[tuple[str, int]]:
    """Each file with the time of its last change."""
    for place, _, files in os.walk(folder):  # which leaves out a folder that was removed meanwhile
        for name in files:
            with suppress(OSError):  # it was renamed
                yield f"{place}/{name}", os.stat(f"{place}/{name}").st_mtime_ns


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
        self.silent_s, self.last = 0.0, ((), time.monotonic())
        """The longest time without a sign: in it no file changed, and SLURM's state of the job did not."""

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

    def state(self) -> dict[str, str]:
        """What scontrol shows; what has changed is noted."""
        now, state = time.monotonic(), self.nodes.state(self.id)
        sign = (state["JobState"], state["Restarts"], *sorted(changes(self.folder)))
        if sign != self.last[0] or state["JobState"] == "PENDING":
            self.last = (sign, now)
        self.silent_s = max(self.silent_s, now - self.last[1])
        return state

    def is_over(self) -> bool:
        """Whether its first attempt has ended."""
        state = self.state()
        return state["Restarts"] != "0" or state["JobState"] not in ("RUNNING", "COMPLETING")

    def reaches(self, step: int) -> None:
        """Wait for the end of a step."""

        def reached() -> bool:
            assert self.state()["JobState"] in ("PENDING", "RUNNING"), self.said()[-3000:]
            return self.step() >= step

        self.nodes.wait(f"step {step}", reached)

    def said(self) -> str:
        """What the script printed."""
        with suppress(OSError):
            return (self.folder / "runs" / "slurm" / f"slurm-{self.id}.out").read_text()
        return ""

    def ends(self, state: str = "COMPLETED") -> None:
        """Wait for its end; queued again it need not wait for its turn.

        SLURM revokes the credentials of what it ended by the second: a job that starts again in that one fails.
        """

        def ended() -> bool:
            now = self.state()
            if now["JobState"] == "PENDING" and now["Reason"] == "BeginTime":
                with suppress(AssertionError):
                    self.nodes.run("scontrol", "update", f"JobId={self.id}", "StartTime=now+2")
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
    # No process is left on the nodes; one whose `unison cluster join` SLURM killed is still ending. Its folder is
    # claimed again by the next cluster.
    count = ["srun", "-N2", "bash", "-c", "pgrep -c raylet || true"]
    nodes.wait("end of every raylet", lambda: set(nodes.run(*count).split()) == {"0"}, 60)


@pytest.mark.nightly
@pytest.mark.serial
@pytest.mark.timeout(6 * 3600)
def test_struck_at_random_every_job_ends_and_no_prompt_is_lost(nodes: Rig, tmp_path: Path) -> None:
    file = Path(os.environ.get("UNISON_STRUCK", tmp_path / "struck.jsonl")).resolve()
    for number in sorted(set(range(STRIKES)) - {row["number"] for row in struck(file)}):
        row = strike(nodes, number)
        with file.open("a") as rows:
            rows.write(json.dumps(row) + "\n")
        print(json.dumps(row))
    rows = struck(file)
    print(added_up(rows))
    assert [row for row in rows if row["error"]] == []
    assert [row for row in rows if row["ended_s"] > HANGS_S or row["silent_s"] > HANGS_S] == []
    # Who cancels a job wants no second attempt.
    wanted = [row for row in rows if row["strike"] != "cancel"]
    assert sum(row["resumed"] for row in wanted) >= 25 / 27 * len(wanted)


def struck(file: Path) -> list[dict[str, Any]]:
    """The rows of strikes that were made."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def added_up(rows: list[dict[str, Any]]) -> str:
    """One line for each kind, and one for all."""
    lines = []
    for kind in [*dict.fromkeys(KINDS), "all"]:
        of = [row for row in rows if kind in (row["strike"], "all")]
        good = [row for row in of if not row["error"]]
        ended, silent, lost = (max((row[name] for row in good), default=0) for name in ("ended_s", "silent_s", "lost"))
        lines.append(
            f"{kind}: {len(of)} struck, {len(good)} ended with a balanced ledger, {sum(row['resumed'] for row in of)} "
            f"resumed; at most {ended:.0f} s to the attempt's end, {silent:.0f} s without a sign, {lost} steps lost"
        )
    return "\n".join(lines)


def strike(nodes: Rig, number: int) -> dict[str, Any]:
    """Strike a job of its own in a step, somewhere, and see it to its end."""
    kind = KINDS[number % len(KINDS)]
    row = {"number": number, "strike": kind, "ended_s": 0.0, "silent_s": 0.0, "resumed": False, "lost": 0, "error": ""}
    job = Job(nodes, f"strike-{number}-{kind}")
    try:
        return row | struck_once(job, kind, random.Random(number))
    except AssertionError as error:
        # A row too: a call that continues must not forget it.
        with suppress(AssertionError):
            nodes.run("scancel", job.id)
        return row | {"error": str(error)[-2000:], "silent_s": round(job.silent_s, 1)}


def struck_once(job: Job, kind: str, draw: random.Random) -> dict[str, Any]:
    """What a strike did."""
    nodes, victim = job.nodes, draw.choice(["n1", "n2"]) if kind == "node" else ""
    job.reaches(draw.randint(1, STEPS // 2))
    # Not always as a step ends.
    time.sleep(draw.uniform(0.0, 2.0))
    at, began = job.step(), time.monotonic()
    if kind == "term":
        nodes.run("scancel", "--signal=TERM", "--batch", job.id)
    elif kind == "everyone":
        nodes.run("scancel", "--signal=TERM", "--full", job.id)
    elif kind == "cancel":
        nodes.run("scancel", job.id)
    elif kind == "preempt":
        other = ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--wrap", "srun true"]
        nodes.run(*other, cwd=job.folder)
    elif kind == "requeue":
        nodes.run("scontrol", "requeue", job.id)
    else:
        nodes.kill_node(victim)
    nodes.wait("end of the attempt", job.is_over)
    ended = time.monotonic() - began
    if victim:
        nodes.revive(victim)
    job.ends("CANCELLED" if kind == "cancel" else "COMPLETED")
    saved = STEPS
    if kind == "cancel":
        # What was saved can be resumed.
        saved = int(finished(job.run / "checkpoints")[-1].name.removeprefix("step-"))
        every_prompt_has_one_state(job.run, prompts=2 * saved)
    else:
        every_prompt_was_trained_once(job.run, prompts=2 * STEPS, samples=4)
    again = [int(step) for step in re.findall(r"resuming after step (\d+)", job.said())]
    lost = max(at - (again[0] if again else saved), 0) if again or kind == "cancel" else 0
    figures = {"node": victim, "step": at, "ended_s": round(ended, 1), "silent_s": round(job.silent_s, 1)}
    return figures | {"resumed": bool(again), "lost": lost}
