"""A whole run whose weights travel over NCCL in disguise, with an engine that dies in each phase of an update."""

import os
from pathlib import Path

import pytest

from processes import assert_gone
from runs import every_prompt_was_trained_once, finish, printed, start, wait_for, wait_for_step

DISGUISE = Path(__file__).parents[1] / "support" / "disguise"
FLAGS = "--steps 40 --prompts-per-step 4 --group-size 4 --max-staleness 1 --save-every 40 --doctor off --no-save-final"
MORE = "--rollout.max-tokens 100 --rollout.engines 2 --rollout.restarts 20 --rollout.retries 20 --trainer.ranks 2"
QUIET = "--tracking.wandb off --tracking.samples-per-step 16"
PHASES = ("load", "begin", "broadcast", "commit", "join")


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", ["1", "3"])
def test_a_run_goes_on_and_loses_no_prompt_whatever_phase_of_an_update_an_engine_dies_in(
    echo_model: Path, tmp_path: Path, stage: str
) -> None:
    plants = tmp_path / "plants"
    plants.mkdir()
    path = os.pathsep.join([str(DISGUISE), os.environ.get("PYTHONPATH", "")])
    env = {"PYTHONPATH": path, "UNISON_PLANTS": str(plants)}
    flags = f"{FLAGS} {MORE} {QUIET} --trainer.zero-stage {stage}"
    process, mark = start(echo_model, tmp_path, *flags.split(), env=env)
    for number, phase in enumerate(PHASES, 1):
        wait_for_step(process, tmp_path, 5 * number)
        failed = [plants / f"{phase}.2"]
        if phase == "join":  # a channel is opened again after another loss
            failed.append(plants / "begin.2")
        for plant in reversed(failed):
            plant.touch()
        done = plants / f"{phase}.2.done"
        wait_for(process, tmp_path, f"planted fault in {phase}", done.exists)
    code, summary, rows = finish(process, tmp_path)
    assert code == 0, printed(tmp_path)
    assert len(rows) == 40
    # One of an engine that could not load; of two engines in three phases, for both hold half an update; two in "join".
    assert len(summary["engines_lost"]) >= len(PHASES) + 1
    assert all(engine["version"] == 40 for engine in summary["engines"])
    every_prompt_was_trained_once(tmp_path / "echo", prompts=160, samples=4)
    assert_gone(mark)
