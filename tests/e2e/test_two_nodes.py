"""Engine and learner on two nodes that share no memory, over a good cable and over a bad one.

UNISON_LINK_STEPS=12 .venv/bin/python -m pytest tests/e2e/test_two_nodes.py -m '' -s      # the whole quickstart, twice
"""

import json
import os
from pathlib import Path

import pytest

from models import make_model
from runs import every_prompt_was_trained_once, start, wait_for
from two_nodes import ROOT, lacking, two_nodes

pytestmark = [pytest.mark.skipif(bool(lacking()), reason=lacking()), pytest.mark.nightly, pytest.mark.serial]
STEPS = int(os.environ.get("UNISON_LINK_STEPS", "2"))
QUICKSTART = ROOT / "recipes" / "quickstart.py"
WHOLE, BEFORE, AFTER = 12, 0.2, 0.67
"""Steps of the quickstart, what it has at most before them, and at least after: README's three seeds, and two of their
standard errors."""
UPDATE_BYTES = 4 * 134e6
"""An update of the model in float32 is sent whole."""


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("delay", "loss"), [(0.0, 0.0), (0.05, 0.05)], ids=["good", "bad"])
def test_the_quickstart_learns_across_two_nodes(tmp_path: Path, delay: float, loss: float) -> None:
    flags = f"--steps {STEPS} --save-every {STEPS} --eval-every {STEPS} --tracking.wandb off --no-save-final"
    flags += " --tracking.samples-per-step 64 --device cpu"
    with two_nodes(tmp_path, delay=delay, loss=loss) as nodes:
        process, _ = start(
            Path("models/smollm2-135m"),
            tmp_path,
            *flags.split(),
            under=nodes.enter("n1"),
            env={"RAY_ADDRESS": "auto"},
            recipe=QUICKSTART,
        )
        rows = tmp_path / "quickstart" / "metrics.jsonl"
        # Of step 0.
        wait_for(process, tmp_path, "row", lambda: rows.exists() and "\n" in rows.read_text(), 1800)
        places = [[name for name in ("n1", "n2") if nodes.holds(name, f"ray::{a}Actor")] for a in ("Learner", "Engine")]
        assert sorted(places) == [["n1"], ["n2"]]
        assert process.wait(3600) == 0, (tmp_path / "terminal.log").read_text()[-3000:]
        carried = nodes.carried()
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    print(f"delay {delay:g} s, loss {loss:.0%}: {carried}, {summary['eval_before']}, {summary['eval_after']}, "
          f"{summary['train_seconds']:.0f} s for {STEPS} steps")  # fmt: skip
    assert summary["status"] == "finished"
    assert carried["bytes"] > STEPS * UPDATE_BYTES, "the weights did not take the cable"
    assert abs(carried["lost"] / carried["packets"] - loss) < 0.01
    every_prompt_was_trained_once(tmp_path / "quickstart", prompts=8 * STEPS, samples=8)
    if STEPS == WHOLE:
        before, after = (summary[f"eval_{when}"]["eval/held_out/avg@3"] for when in ("before", "after"))
        assert before < BEFORE
        assert after > AFTER


@pytest.mark.timeout(900)
def test_a_folder_that_the_other_node_lacks_ends_the_run_before_its_first_step(tmp_path: Path) -> None:
    model, own = tmp_path / "model", "/tmp/own-disk-of-n1"
    model.mkdir()
    make_model(model, peak=1.0)
    # Two ranks, and a place for one next to the driver.
    flags = f"--trainer.ranks 2 --output-dir {own} --doctor off --tracking.wandb off --device cpu"
    with two_nodes(tmp_path, places=(1, 2)) as nodes:
        under, env = nodes.enter("n1"), {"RAY_ADDRESS": "auto"}
        process, _ = start(model, tmp_path, *flags.split(), under=under, env=env)
        code, said = process.wait(600), " ".join((tmp_path / "terminal.log").read_text().split())
        assert code == 2, said
        assert f"the folder {own}/echo on n2 is not the driver's" in said
        assert "step 1/" not in said
