"""A disk that is full costs what does not fit, is reported once, and leaves every file readable."""

import asyncio
import errno
import json
from pathlib import Path

import pytest

from full_disk import full_beyond
from rl.config import Config, TrackingConfig
from rl.protocols import StallError
from rl.types import Data
from trainer import outcome
from trainer.outcome import export_model, leave
from trainer.runs import checkpoint
from trainer.runs.files import RESERVED, Reserve, Rows, write_json
from trainer.tracking.tracker import RunTracker

CONFIG = Config(name="t", model="m", data=lambda: Data(train=[]), reward=lambda reply: 1.0)
SUMMARY = {
    "name": "t",
    "status": "finished",
    "steps": 2,
    "ledger": {},
    "stack": {},
    "eval_after": {},
    "config_digest": "",
}


def rows_of(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_rows_ends_with_a_whole_row_and_gets_the_others_when_there_is_space(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    rows.append({"step": 1})
    with full_beyond(16):  # a row and a half
        for step in (2, 3):
            with pytest.raises(OSError, match="File too large"):
                rows.append({"step": step})
            assert rows_of(rows.path) == [{"step": 1}]
    rows.append({"step": 4})
    assert rows_of(rows.path) == [{"step": step} for step in (1, 2, 3, 4)]
    rows.close()


def test_of_the_rows_that_wait_as_many_are_written_as_there_is_space_for(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    with full_beyond(4):
        for step in (1, 2, 3):
            with pytest.raises(OSError, match="File too large"):
                rows.append({"step": step})
    with full_beyond(30), pytest.raises(OSError, match="File too large"):  # two rows and a half
        rows.close()
    assert rows_of(rows.path) == [{"step": 1}, {"step": 2}]


def test_a_run_whose_metrics_cannot_be_written_continues_with_one_alert_and_loses_no_row(tmp_path, capsys):
    tracker = RunTracker(folder=tmp_path, config=TrackingConfig(wandb="off"), name="t", settings={})
    tracker.log(1, {"reward/mean": 0.5})
    with full_beyond((tmp_path / "metrics.jsonl").stat().st_size):
        for step in (2, 3):
            tracker.log(step, {"reward/mean": 0.5})
    assert [alert["title"] for alert in tracker.alerts] == [
        "metrics.jsonl cannot be written",
        "alerts.jsonl cannot be written",
    ]
    assert "File too large" in capsys.readouterr().out
    tracker.close({})
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert rows_of(tmp_path / "alerts.jsonl") == tracker.alerts


def test_json_that_does_not_fit_leaves_the_former_file_and_no_part_of_a_new_one(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with full_beyond(4), pytest.raises(OSError, match="File too large"):
        write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_reserve_takes_space_until_it_is_freed(tmp_path):
    reserve = Reserve(tmp_path)
    assert reserve.path.stat().st_blocks * 512 >= RESERVED
    reserve.free()
    assert list(tmp_path.iterdir()) == []
    reserve.free()
    with full_beyond(4):
        Reserve(tmp_path)


def left(folder, summary=SUMMARY):
    tracker = RunTracker(folder=folder, config=TrackingConfig(wandb="off"), name="t", settings={})
    tracker.log(1, {"reward/mean": 0.5})
    leave(folder, dict(summary), tracker, Reserve(folder))
    return tracker


def test_a_plot_that_cannot_be_drawn_is_an_alert(tmp_path, monkeypatch):
    def no_home(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(outcome, "plot", no_home)
    tracker = left(tmp_path)
    assert [alert["title"] for alert in tracker.alerts] == ["curves.png cannot be drawn"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["alerts"]) == ("finished", 1)


def test_a_summary_that_cannot_be_written_is_printed(tmp_path, capsys):
    (tmp_path / "summary.json.partial").mkdir()
    left(tmp_path, SUMMARY | {"steps": 0})
    printed = capsys.readouterr().out
    assert "summary.json cannot be written" in printed
    assert '"status": "finished"' in printed
    assert "t: finished" in printed


class Cluster:
    """Learner ranks whose export raises."""

    def __init__(self, error):
        self.error = error

    async def ask_learners(self, ask):
        raise self.error


async def exported(folder, error):
    await export_model(Cluster(error), None, folder, CONFIG, SUMMARY, {})


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("No space left on device (os error 28)"),  # tokenizers raises no OSError
    ],
    ids=["system", "library"],
)
def test_an_export_that_fails_names_the_checkpoint_and_the_command(tmp_path, error):
    draft = checkpoint.draft(tmp_path, 2)
    (draft / "learner" / "a").write_bytes(b"weights")
    kept = checkpoint.commit(draft, 2, {"name": "t"}, keep_last=1)
    (tmp_path / ".model.partial").mkdir()
    with pytest.raises(OSError, match="could not be exported") as failed:
        asyncio.run(exported(tmp_path, error))
    assert "No space left on device" in str(failed.value)
    assert f"The trained weights are in {kept}. Make space, then export it with: " in str(failed.value)
    assert str(failed.value).endswith(f"--resume {tmp_path}")
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / ".model.partial").exists()


def test_a_learner_that_hangs_in_the_export_is_no_full_disk(tmp_path):
    with pytest.raises(StallError, match="late"):
        asyncio.run(exported(tmp_path, StallError("late")))
