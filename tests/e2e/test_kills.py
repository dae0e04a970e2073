"""Kill -9 of any process at seeded moments, then go on: nothing is lost, nothing is trained on twice.

UNISON_KILLS=100 .venv/bin/python -m pytest tests/e2e/test_kills.py -m nightly -s      # each mode; an hour

All run nightly. In the gate test_resume.py kills a synchronous run, and test_runs.py an asynchronous one with episodes,
its engines and its environments' processes.
"""

import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models import make_model
from processes import assert_gone, marked
from runs import RECIPE, TWO_TURNS, every_prompt_was_trained_once, finish, printed, start, wait_for
from trainer.runs.checkpoint import finished

pytestmark = pytest.mark.nightly
KILLS = int(os.environ.get("UNISON_KILLS", "2"))
STEPS = 30 + 6 * KILLS
PROMPTS, SAMPLES = 8, 4
FLAGS = (
    f"--steps {STEPS} --save-every 2 --prompts-per-step {PROMPTS} --group-size {SAMPLES} --rollout.max-tokens 4 "
    f"--old-logprobs recompute --doctor off --tracking.wandb off --rollout.restarts 1000 --rollout.retries 1000 "
    f"--tracking.samples-per-step {PROMPTS * SAMPLES} --trainer.lr 1e-3"
).split()
VICTIMS = {
    "driver": None,
    "engine": "ray::EngineActor",
    "learner": "ray::LearnerActor",
    "environment worker": "ray::EnvProcess",
}
WEIGHTS = [3, 4, 3]
"""How often each is struck; environment workers are in runs with episodes alone."""
EPISODES = [*FLAGS, "--rollout.max-tokens", "24", "--env-workers", "2"]
"""One turn in four ends before its limit, and its episode has a second one."""


def rows_of(folder: Path) -> list[dict]:
    path = folder / "echo" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    # The last line may be half written.
    return [json.loads(line) for line in lines if line.endswith("}")]


def step_of(folder: Path) -> int:
    path = folder / "echo" / "metrics.jsonl"
    return max(path.read_bytes().count(b"\n") - 1, 0) if path.exists() else 0  # the first line is of step 0


def wait_for_next(process: subprocess.Popen, folder: Path) -> None:
    """Return once one more step is recorded, or the run has ended."""
    step = step_of(folder) + 1
    wait_for(process, folder, f"step {step}", lambda: step_of(folder) >= step or process.poll() is not None)


def strike(mark: str, process: subprocess.Popen, victim: str) -> bool:
    """Kill it, and say whether it was there yet."""
    if victim == "driver":
        process.kill()
        return True
    for each, command in marked(mark):
        if command.startswith(VICTIMS[victim]):
            each.kill()
            return True
    return False


def killed_again_and_again(
    model: Path, folder: Path, flags: list[str], seed: int, recipe: Path = RECIPE
) -> dict[str, int]:
    """Run to the end, through KILLS kills. Returns how often each victim was struck."""
    rng, struck = random.Random(seed), dict.fromkeys(VICTIMS, 0)
    weights = [*WEIGHTS, 3 if "--env-workers" in flags else 0]
    process, mark = start(model, folder, *flags, recipe=recipe)
    while sum(struck.values()) < KILLS:
        victim, early = rng.choices(list(VICTIMS), weights)[0], rng.random() < 0.15
        if early:
            time.sleep(rng.uniform(0.0, 20.0))
        else:
            wait_for_next(process, folder)
            time.sleep(rng.uniform(0.0, 1.5))
        if process.poll() == 0:
            break
        hit = process.poll() is None and strike(mark, process, victim)
        if hit:
            struck[victim] += 1
            print(f"kill {sum(struck.values())}: {victim}, step {step_of(folder)}{' (or in a start)' if early else ''}")
        # A run survives its engines and environments, but for one that is struck in its very start.
        if (hit and victim in ("driver", "learner")) or process.poll() is not None:
            assert process.wait(120) != 0, printed(folder)
            assert_gone(mark, 300)  # Ray's own agents give up late where they never met their raylet
            again = ["--resume", str(folder / "echo")]
            if not finished(folder / "echo" / "checkpoints"):  # struck before the first, or in it: it begins anew
                shutil.rmtree(folder / "echo", ignore_errors=True)
                again = flags
            process, mark = start(model, folder, *again, recipe=recipe)
    process.wait(900)
    assert sum(struck.values()) == KILLS, "the run ended before its last kill: give it more steps"
    return struck


def ends_well(folder: Path) -> None:
    summary = json.loads((folder / "echo" / "summary.json").read_text())
    assert summary["status"] == "finished"
    every_prompt_was_trained_once(folder / "echo", prompts=STEPS * PROMPTS, samples=SAMPLES)


@pytest.mark.timeout(7200)
def test_asynchronous_runs_lose_no_prompt_and_train_none_twice(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", peak=1.0)
    struck = killed_again_and_again(model, tmp_path, [*FLAGS, "--max-staleness", "2"], seed=1)
    print(struck)
    ends_well(tmp_path)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("staleness", [0, 2])
def test_runs_with_episodes_lose_no_prompt_and_train_none_twice(
    chat_model: Path, tmp_path: Path, staleness: int
) -> None:
    flags = [*EPISODES, "--max-staleness", str(staleness)]
    print(killed_again_and_again(chat_model, tmp_path, flags, seed=3 + staleness, recipe=TWO_TURNS))
    ends_well(tmp_path)
    assert max(row.get("episode/turns_max", 0.0) for row in rows_of(tmp_path)) == 2
    # An environment that died with its process is played again, and its group does not fail.
    ledger = json.loads((tmp_path / "echo" / "summary.json").read_text())["ledger"]
    assert set(ledger) <= {"pending", "trained", "filtered(too_old)"}


@pytest.mark.timeout(7200)
def test_synchronous_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", peak=1.0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    process, _ = start(model, whole, *FLAGS)
    assert finish(process, whole, 1800)[0] == 0
    print(killed_again_and_again(model, killed, FLAGS, seed=2))
    for folder in (whole, killed):
        ends_well(folder)
    tensors = []
    for folder in (killed, whole):
        last = sorted((folder / "echo" / "checkpoints").iterdir())[-1]
        tensors.append({k: v for path in last.glob("learner/*.safetensors") for k, v in load_file(path).items()})
    assert tensors[0].keys() == tensors[1].keys()
    assert [name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])] == []
    texts = [(folder / "echo" / "samples.jsonl").read_text() for folder in (killed, whole)]
    assert texts[0] == texts[1]
    assert any(row["actor/grad_norm"] > 0 for row in rows_of(whole)[-3:]), "nothing was learned that could be lost"
