"""Whole runs on machines that lack something: each ends well, with a readable folder, and leaves no process.

The rules behind them have unit tests in the gate: test_machine.py, test_home.py, test_disk.py, test_terminal.py,
test_tracking.py and test_stop.py.
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from processes import assert_gone
from runs import finish, printed, start, wait_for_step

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1200)]
FLAGS = "--steps 2 --prompts-per-step 2 --group-size 4 --doctor off --tracking.wandb off --save-every 1"
TINY = FLAGS.split()
KEY = "0123456789" * 4


def ends_well(model: Path, folder: Path, *flags: str, **options) -> dict:
    """Run to the end; returns the summary."""
    process, mark = start(model, folder, *TINY, *flags, **options)
    code, summary, rows = finish(process, folder)
    assert code == 0, printed(folder)
    assert summary["status"] == "finished"
    assert [row["step"] for row in rows] == [1, 2]
    assert summary["ledger"] == {"pending": 0, "trained": 4}
    assert (folder / "echo" / "model" / "model.safetensors").stat().st_size > 0
    assert "Traceback" not in (folder / "terminal.log").read_text()
    assert_gone(mark)
    return summary


def permitted(*command: str) -> None:
    """Skip where this user may not."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{' '.join(command[:3])} is not permitted here: {done.stderr.strip()}")


def mounted(what: str) -> list[str]:
    """A command that mounts something for the rest of its line alone."""
    permitted("unshare", "-m", "true")
    return ["unshare", "-m", "--propagation", "private", "bash", "-c", f'mount -t tmpfs {what} && exec "$@"', "--"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A disk of a given size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def make(size: str) -> Path:
        permitted("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk))
        return disk

    yield make
    subprocess.run(["umount", "-l", str(disk)], capture_output=True)


def fill(disk: Path) -> None:
    """Leave no byte free."""
    with (disk / "others").open("wb", buffering=0) as others, suppress(OSError):
        while True:
            others.write(bytes(1 << 12))


def alerts(run: Path) -> list[str]:
    return [json.loads(line)["title"] for line in (run / "alerts.jsonl").read_text().splitlines()]


def test_a_tracker_that_cannot_be_reached_records_offline(echo_model: Path, tmp_path: Path) -> None:
    env = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_MODE": None}
    summary = ends_well(echo_model, tmp_path, "--tracking.wandb", "auto", env=env)
    assert summary["alerts"] == 1
    assert alerts(tmp_path / "echo") == ["W&B is not online"]
    assert list((tmp_path / "echo").glob("wandb/offline-run-*"))


def test_a_tracker_that_must_be_online_ends_the_run_with_one_message(echo_model: Path, tmp_path: Path) -> None:
    env = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    process, mark = start(echo_model, tmp_path, *TINY, "--tracking.wandb", "online", env=env)
    code, summary, rows = finish(process, tmp_path)
    assert (code, summary["status"], rows) == (2, "failed", [])
    assert "W&B must be online" in summary["error"]
    assert "Traceback" not in (tmp_path / "terminal.log").read_text()
    assert_gone(mark)


def test_a_disk_that_is_full_at_every_checkpoint_costs_the_checkpoints_alone(
    echo_model: Path, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("3m")  # a checkpoint has 3.8 MB, the model 1.3
    process, mark = start(echo_model, disk, *TINY)
    code, summary, rows = finish(process, disk)
    assert (code, summary["status"], len(rows)) == (0, "finished", 2), printed(disk)
    # While a checkpoint fills the disk there is no space for the record either.
    assert set(alerts(disk / "echo")) - {"rollouts cannot be recorded"} == {"no checkpoint could be made"}
    assert list((disk / "echo" / "checkpoints").iterdir()) == []
    assert (disk / "echo" / "model" / "model.safetensors").stat().st_size > 0
    assert_gone(mark)


def test_a_disk_that_is_full_at_the_export_keeps_the_checkpoint_from_which_the_model_is_exported_later(
    echo_model: Path, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("4600k")
    process, mark = start(echo_model, disk, *TINY, "--save-every", "2")
    code, summary, rows = finish(process, disk)
    assert (code, summary["status"], len(rows)) == (2, "failed", 2), printed(disk)
    assert f"The trained weights are in {disk / 'echo' / 'checkpoints' / 'step-000002'}" in summary["error"]
    assert summary["resume"].endswith(f"--resume {disk / 'echo'}")
    assert not (disk / "echo" / "model").exists()
    assert "Traceback" not in (disk / "terminal.log").read_text()
    assert_gone(mark)
    permitted("mount", "-o", "remount,size=32m", str(disk))
    process, mark = start(echo_model, disk, "--resume", str(disk / "echo"))
    code, summary, _ = finish(process, disk)
    assert (code, summary["status"]) == (0, "finished"), printed(disk)
    assert (disk / "echo" / "model" / "model.safetensors").stat().st_size > 0
    assert_gone(mark)


def test_rows_of_metrics_wait_while_the_disk_is_full(
    echo_model: Path, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("8m")
    process, mark = start(echo_model, disk, *TINY, "--steps", "40", "--save-every", "0", "--no-save-final")
    wait_for_step(process, disk, 1)
    fill(disk)
    code, summary, rows = finish(process, disk)
    assert (code, summary["status"]) == (0, "finished"), printed(disk)
    assert [row["step"] for row in rows] == list(range(1, 41)), "the last rows were written into the reserve"
    assert "metrics.jsonl cannot be written" in (disk / "terminal.log").read_text() + str(alerts(disk / "echo"))
    assert_gone(mark)


def test_a_terminal_that_knows_ascii_alone(echo_model: Path, tmp_path: Path) -> None:
    process, mark = start(echo_model, tmp_path, *TINY, "--name", "näme", env={"PYTHONIOENCODING": "ascii"})
    assert process.wait(560) == 0, printed(tmp_path)
    text = (tmp_path / "terminal.log").read_bytes().decode("ascii")
    assert "n\\xe4me: finished" in text
    assert "+- " in text
    assert json.loads((tmp_path / "näme" / "summary.json").read_text())["status"] == "finished"
    assert_gone(mark)


def test_one_core_of_a_machine_that_has_more(echo_model: Path, tmp_path: Path) -> None:
    ends_well(echo_model, tmp_path, under=["taskset", "-c", str(min(os.sched_getaffinity(0)))])


def test_a_user_without_a_name_and_without_a_home(echo_model: Path, tmp_path: Path) -> None:
    # It may read what root may, because this Python may be root's; it may not write.
    user = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
    user += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    permitted(*user, "true")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o777)
    nobody = dict.fromkeys(("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"))
    ends_well(echo_model, tmp_path, under=user, env=nobody)
    assert "there is no home folder" in (tmp_path / "terminal.log").read_text()
    assert not (Path.cwd() / "~").exists()


def test_a_home_whose_caches_cannot_be_written(echo_model: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    under = mounted(f"-o ro tmpfs {home}")
    ends_well(echo_model, tmp_path, "--tracking.wandb", "offline", under=under, env={"HOME": str(home)})
    assert "caches cannot be written" in (tmp_path / "terminal.log").read_text()


def test_a_megabyte_of_shared_memory(echo_model: Path, tmp_path: Path) -> None:
    ends_well(echo_model, tmp_path, under=mounted("-o size=1m tmpfs /dev/shm"))
    text = (tmp_path / "terminal.log").read_text()
    assert "/dev/shm has 0.00 GiB free, so Ray keeps its objects in files and weights travel by sockets" in text


def test_two_runs_of_one_name_that_start_at_once_have_a_folder_each(echo_model: Path, tmp_path: Path) -> None:
    env = {"UNISON_IGNORE_MEMORY": "1"}
    both = [start(echo_model, tmp_path, *TINY, env=env, log=f"{i}.log") for i in range(2)]
    for i, (process, mark) in enumerate(both):
        assert process.wait(560) == 0, (tmp_path / f"{i}.log").read_text()[-3000:]
        assert_gone(mark)
    for name in ("echo", "echo-2"):
        assert json.loads((tmp_path / name / "summary.json").read_text())["status"] == "finished"


def test_three_times_ctrl_c_within_a_second_is_one(echo_model: Path, tmp_path: Path) -> None:
    process, mark = start(echo_model, tmp_path, *TINY, "--steps", "400")
    wait_for_step(process, tmp_path, 3)
    for _ in range(3):
        os.killpg(process.pid, signal.SIGINT)
    code, summary, rows = finish(process, tmp_path)
    assert (code, summary["status"]) == (130, "interrupted"), printed(tmp_path)
    assert summary["steps"] == len(rows) >= 3
    assert (tmp_path / "echo" / "curves.png").stat().st_size > 0
    assert summary["resume"] in (tmp_path / "terminal.log").read_text()
    assert "Traceback" not in (tmp_path / "terminal.log").read_text()
    assert_gone(mark)
