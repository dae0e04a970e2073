"""Checkpoints on disk: whole or not there whenever the writer is killed, and not used when a byte has changed."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import writer
from trainer.runs import checkpoint
from trainer.runs.checkpoint import CheckpointError
from writer import write


def steps(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in sorted((run / "checkpoints").glob("step-*"))]


def test_what_was_written_is_what_is_found_and_only_the_newest_are_kept(tmp_path):
    for step in (2, 4, 6, 8):
        folder = write(tmp_path, step)
        found = checkpoint.latest(tmp_path)
        assert (found.folder, found.state, found.damaged) == (folder, {"name": "t", "step": step}, {})
        assert (folder / "learner" / "layer-0000.safetensors").read_bytes() == bytes([step]) * 1000
    assert steps(tmp_path) == [6, 8]
    write(tmp_path, 10, keep_last=1)
    assert steps(tmp_path) == [10]
    assert not list((tmp_path / "checkpoints").glob(".*")), "nothing half written or half deleted is left"


def test_steps_are_ordered_as_numbers(tmp_path):
    write(tmp_path, 999_999)
    write(tmp_path, 1_000_000)
    assert checkpoint.latest(tmp_path).state["step"] == 1_000_000


def killed_at(moment: int, run: Path) -> bool:
    """Write the checkpoint of step 6 in a process that is gone before its moment-th operation on a file; False when it
    has no such operation."""
    ended = subprocess.run([sys.executable, writer.__file__, run, "6", str(moment)], timeout=60).returncode
    assert ended in (0, writer.KILLED)
    return ended == writer.KILLED


@pytest.mark.slow
def test_a_writer_that_is_killed_before_any_of_its_file_operations_leaves_a_whole_checkpoint(tmp_path):
    ends, moment = [], 0
    while True:
        run = tmp_path / str(moment)
        write(run, 2)
        write(run, 4)
        killed = killed_at(moment, run)
        found = checkpoint.latest(run)
        assert found.damaged == {}, "half a checkpoint looks like one"
        assert found.state["step"] in (4, 6)
        assert (found.folder / "learner" / "layer-0000.safetensors").read_bytes()[0] == found.state["step"]
        # The next one goes on as if nothing had been.
        checkpoint.sweep(run)
        write(run, 8)
        assert checkpoint.latest(run).state["step"] == 8
        assert len(steps(run)) == 2
        assert not list((run / "checkpoints").glob(".*"))
        ends.append(found.state["step"])
        moment += 1
        if not killed:
            break
    assert ends == sorted(ends), "it appears at one moment, and stays"
    assert ends.count(4) > 15
    assert ends.count(6) > 3, "also while the oldest is deleted"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILES = ["learner/layer-0000.safetensors", "history.jsonl", "state.json", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("harm", "says"), [(cut, "torn|seal"), (flip, "damaged"), (Path.unlink, "is missing")])
def test_a_checkpoint_with_a_changed_byte_is_named_and_the_last_good_one_is_used(tmp_path, file, harm, says):
    write(tmp_path, 2)
    newest = write(tmp_path, 4)
    harm(newest / file)
    found = checkpoint.latest(tmp_path)
    assert found.state["step"] == 2
    assert list(found.damaged) == [newest]
    assert str(newest / file) in found.damaged[newest]
    with pytest.raises(CheckpointError, match=says):
        checkpoint.verify(newest)
    # Out of the row, it is not counted among those that are kept, nor in the way of the same step.
    checkpoint.set_aside(newest)
    assert write(tmp_path, 4) == newest
    assert steps(tmp_path) == [2, 4]
    assert checkpoint.latest(tmp_path).damaged == {}
    assert len(list((tmp_path / "checkpoints").glob("damaged-step-000004-*"))) == 1


def test_every_bit_of_the_manifest_counts(tmp_path):
    manifest = write(tmp_path, 2) / "manifest.json"
    good = manifest.read_bytes()
    for index in range(0, len(good), 7):
        harmed = bytearray(good)
        harmed[index] ^= 1 << (index % 7)
        if json_of(harmed) == json.loads(good):
            continue  # white space
        manifest.write_bytes(harmed)
        with pytest.raises(CheckpointError):
            checkpoint.verify(manifest.parent)


def json_of(data):
    try:
        return json.loads(bytes(data))
    except ValueError:
        return None


def test_a_checkpoint_of_a_newer_schema_is_refused_and_the_last_good_one_is_named(tmp_path, monkeypatch):
    old = write(tmp_path, 2)
    monkeypatch.setattr(checkpoint, "SCHEMA", 2)
    new = write(tmp_path, 4)
    monkeypatch.setattr(checkpoint, "SCHEMA", 1)
    with pytest.raises(CheckpointError) as refused:
        checkpoint.latest(tmp_path)
    assert f"{new}/manifest.json was written by a newer unison (schema 2" in str(refused.value)
    assert f"The last good one is {old}" in str(refused.value)


def test_a_run_without_a_whole_checkpoint_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="there is no run in"):
        checkpoint.latest(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint yet: start the run again, with --save-every"):
        checkpoint.latest(tmp_path)
    flip(write(tmp_path, 2) / "state.json")
    with pytest.raises(CheckpointError, match=r"state\.json is damaged.*\nno checkpoint in .* is whole"):
        checkpoint.latest(tmp_path)


def test_a_disk_that_is_full_costs_the_new_checkpoint_and_not_the_old_ones(tmp_path, monkeypatch):
    write(tmp_path, 2)
    write(tmp_path, 4)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, 6)
    checkpoint.sweep(tmp_path)
    assert steps(tmp_path) == [2, 4]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_state_that_is_no_json_is_never_written(tmp_path):
    draft = checkpoint.draft(tmp_path, 2)
    (draft / "learner" / "layer-0000.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.commit(draft, 2, {"name": "t", "x": math.nan}, keep_last=2)
    assert steps(tmp_path) == []


def test_a_checkpoint_without_a_learner_is_none(tmp_path):
    with pytest.raises(OSError, match="the driver sees nothing there"):
        checkpoint.commit(checkpoint.draft(tmp_path, 2), 2, {"name": "t"}, keep_last=2)
    assert steps(tmp_path) == []


def test_a_folder_has_one_owner_at_a_time(tmp_path):
    held = checkpoint.lock(tmp_path)
    with pytest.raises(CheckpointError, match="another process runs in"):
        checkpoint.lock(tmp_path)
    held.close()
    checkpoint.lock(tmp_path).close()


def test_a_copied_run_is_as_good_as_the_first(tmp_path):
    write(tmp_path / "a", 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert checkpoint.latest(tmp_path / "b").state["step"] == 2
