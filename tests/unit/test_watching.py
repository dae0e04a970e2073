"""`unison watch`: a run that lives, has ended, or was killed, on any terminal and without one."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from trainer.cli import COMMANDS
from trainer.commands import watch as command
from trainer.commands.watch import watch
from trainer.runs import checkpoint
from trainer.runs.reading import Lines, Reading
from trainer.tracking import terminal
from trainer.tracking.board import board, ends_in
from trainer.tracking.terminal import Terminal, as_minutes, as_typed, closing_table, working

ROW = {
    "reward/mean": 0.25,
    "reward/mean_se": 0.05,
    "rollout_corr/logprob_abs_diff_mean": 1.5e-7,
    "actor/entropy": 1.25,
    "response_length/mean": 40.0,
    "response_length/truncated_frac": 0.03,
    "queue/sampling": 6.0,
    "queue/scoring": 0.0,
    "queue/ready": 2.0,
    "queue/oldest_s": 12.0,
    "timing_s/step": 4.0,
    "timing_s/wait_for_samples": 2.0,
    "timing_s/learn": 1.5,
    "weight_sync/seconds": 0.25,
    "perf/trainer_idle_frac": 0.5,
    "perf/rollout_idle_frac": 0.1,
}


def append(path, row):
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


@pytest.fixture
def run(tmp_path):
    """A folder of a run of 10 steps with an evaluation and 4 steps, and no process behind it."""
    (tmp_path / "config.json").write_text(json.dumps({"name": "quick", "steps": 10, "max_staleness": 1}))
    append(tmp_path / "metrics.jsonl", {"step": 0.0, "eval/held_out/avg@4": 0.1, "eval/held_out/avg@4_se": 0.01})
    for step in range(1, 5):
        append(tmp_path / "metrics.jsonl", {"step": float(step), **ROW, "reward/mean": 0.1 * step})
    return tmp_path


def shown(run, *, width=100, encoding="utf-8"):
    """The board's lines on a terminal of this width."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    screen = Terminal(file=file, width=width, force_terminal=False)
    reading = Reading(run)
    reading.refresh()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal, "console", screen)  # its encoding decides about signs and bars
        screen.print(board(reading, screen))
    file.flush()
    return file.buffer.getvalue().decode(encoding).splitlines()


def test_a_live_run_shows_every_figure_that_people_look_at(run):
    append(run / "alerts.jsonl", {"step": 3, "title": "a gap", "text": "Look."})
    held = checkpoint.lock(run)
    text = "\n".join(shown(run, width=140))
    held.close()
    for part in (
        "quick",
        "running",
        "4 of 10",
        "about 24 s left",
        "0.400 ± 0.050",
        "first 0.1, best 0.4",
        "held_out/avg@4 0.100 ± 0.010 after step 0",
        "1.5e-07 nats",
        "1.25 nats",
        "40 tokens, 3% cut off",
        "sampling 6 ████████  scoring 0 ░░░░░░░░  ready 2 ███░░░░░  the oldest since 12 s",
        "4.0 s a step (wait 2.0, learn 1.5, update 0.2); the learner waited for the engines 50% of it",
        "alert at step 3: a gap. Look.",
    ):
        assert part in text, part


def test_a_run_whose_process_is_gone_was_killed_and_one_with_a_summary_has_ended(run, capsys):
    assert "killed" in shown(run)[0]
    assert watch([str(run), "--once"]) == 1
    assert "Its process is gone" in capsys.readouterr().out
    (run / "summary.json").write_text(json.dumps({"status": "interrupted", "resume": "python a.py --resume 'x y'"}))
    assert "interrupted" in shown(run)[0]
    assert watch([str(run), "--once"]) == 1
    assert capsys.readouterr().out.endswith("resume with: python a.py --resume 'x y'\n")
    # Resumed, and then killed: the summary is that of the earlier try.
    os.utime(run / "summary.json", (1, 1))
    assert "killed" in shown(run)[0]
    held = checkpoint.lock(run)
    assert "running" in shown(run)[0]
    held.close()


def test_a_failed_run_shows_its_error_and_the_exit_status_tells_how_it_ended(run, capsys):
    (run / "summary.json").write_text(json.dumps({"status": "failed", "error": "ValueError: no\nmore"}))
    assert watch([str(run), "--once"]) == 1
    assert "ValueError: no" in capsys.readouterr().out
    (run / "summary.json").write_text(json.dumps({"status": "finished"}))
    assert watch([str(run), "--once"]) == 0


def test_a_run_that_has_not_made_a_step_is_shown(run):
    (run / "metrics.jsonl").unlink()
    held = checkpoint.lock(run)
    text = "\n".join(shown(run))
    held.close()
    assert "0 of 10" in text
    assert "no step has ended yet" in text


def test_a_message_that_holds_control_characters_moves_no_cursor(run):
    append(run / "alerts.jsonl", {"step": 3, "title": "\x1b[2J", "text": "\x1b]0;title\x07 \u202e \r gone"})
    text = "\n".join(shown(run))
    assert not set(text) & set("\x1b\x07\r\u202e")


def test_figures_that_are_not_numbers_are_shown_as_such(run):
    append(run / "metrics.jsonl", {**dict.fromkeys(ROW), "step": 5.0, "reward/mean": 0.5})
    text = "\n".join(shown(run))
    assert "not a number" in text
    assert "0.500" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is no folder of a run .*: give one that holds config\.json"):
        watch([str(tmp_path)])


@pytest.mark.parametrize("width", [20, 40, 79, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_board_fits_every_terminal(run, width, encoding):
    append(
        run / "alerts.jsonl",
        {"step": 3, "title": "rollout_corr/logprob_abs_diff_mean left its range", "text": "x " * 90},
    )
    lines = shown(run, width=width, encoding=encoding)
    assert max(map(len, lines)) <= width
    assert "quick" in lines[0]
    if encoding == "ascii":
        assert "\\u" not in "\n".join(lines), "no escapes instead of bars"


def test_a_growing_file_is_read_by_whole_lines_and_again_from_its_begin_when_it_is_replaced(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = Lines(path)
    assert lines.more() == 0
    path.write_text('{"step": 1}\n{"st')
    assert (lines.more(), lines.rows) == (1, [{"step": 1}])
    with path.open("a") as file:
        file.write('ep": 2}\nbroken\n')
    assert (lines.more(), lines.rows) == (1, [{"step": 1}, {"step": 2}])
    other = tmp_path / "other"
    for rows in ([{"step": 1}], [{"step": s, "again": True} for s in range(9)]):
        other.write_text("".join(json.dumps(row) + "\n" for row in rows))
        other.replace(path)
        lines.more()
        assert lines.rows == rows, "a resumed run has gone back, and may have written more since"


def test_without_a_terminal_each_step_and_alert_is_a_line_and_the_command_ends_with_the_run(run, capsys, monkeypatch):
    held, looked = checkpoint.lock(run), threading.Event()

    def sleep(_):
        # What the run does while the command sleeps: one more step, an alert, and its end.
        if not looked.is_set():
            looked.set()
            append(run / "metrics.jsonl", {"step": 5.0, **ROW, "actor/entropy": None})
            append(run / "alerts.jsonl", {"step": 5, "title": "a gap", "text": "Look."})
        else:
            (run / "summary.json").write_text(json.dumps({"status": "finished"}))
            held.close()

    # The command's own clock: other threads of this process sleep too.
    monkeypatch.setattr(command, "time", SimpleNamespace(**vars(time) | {"sleep": sleep}))
    assert watch([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step ") and "/" in line]
    assert [line.split()[1] for line in steps] == ["0/10", "1/10", "2/10", "3/10", "4/10", "5/10"]
    assert "entropy nan" in steps[-1]
    assert lines.count("alert at step 5: a gap. Look.") == 2, "when it came, and in the last state"
    assert any("finished" in line for line in lines)


def test_a_watcher_keeps_no_run_from_starting_and_no_other_watcher_from_looking(run):
    reading, other = Reading(run), Reading(run)
    for _ in range(3):
        reading.refresh()
        other.refresh()
        checkpoint.lock(run).close()


@pytest.mark.slow
def test_a_live_run_is_followed_in_a_terminal_until_it_ends(run):
    pty = pytest.importorskip("pty")
    held = checkpoint.lock(run)
    ours, theirs = pty.openpty()
    program = [
        sys.executable,
        "-c",
        "import sys; from trainer.cli import main; sys.argv = ['unison', *sys.argv[1:]]; main()",
    ]
    process = subprocess.Popen(
        [*program, "watch", str(run)], stdout=theirs, stderr=theirs, stdin=theirs, close_fds=True
    )
    os.close(theirs)
    seen = b""

    def until(text):
        nonlocal seen
        while text not in seen:
            seen += os.read(ours, 65536)

    until(b"4 of 10")
    append(run / "metrics.jsonl", {"step": 5.0, **ROW})
    until(b"5 of 10")
    (run / "summary.json").write_text(json.dumps({"status": "finished"}))
    held.close()
    until(b"finished")
    assert process.wait() == 0
    os.close(ours)


def test_the_time_that_is_left_is_that_of_the_median_step():
    rows = [{"step": float(s), "timing_s/step": 9000.0 if s == 3 else 30.0} for s in range(1, 6)]
    assert ends_in(rows, 10) == 150.0
    assert ends_in([{"step": 1.0}], 10) is None
    assert [as_minutes(s) for s in (59.6, 150, 7300)] == ["60 s", "2 min", "2 h 2 min"]


def test_the_command_is_listed():
    assert "watch" in COMMANDS


# -- progress ----------------------------------------------------------------------------------------------------------


def test_a_terminal_shows_how_many_parts_are_done_and_nothing_else_does(monkeypatch):
    for is_terminal in (True, False):
        file = io.StringIO()
        monkeypatch.setattr(terminal, "console", Terminal(file=file, force_terminal=is_terminal, width=100))
        monkeypatch.setenv("TERM", "xterm")
        with working("evaluating", total=3) as done:
            done()
            done()
            with working("within", total=5) as inner:
                inner()
        text = file.getvalue()
        assert ("evaluating" in text) == is_terminal
        assert ("2/3" in text) == is_terminal
        assert "within" not in text, "one bar at a time"


class Hangup(io.StringIO):
    """A terminal whose window was closed."""

    def isatty(self):
        return True

    def write(self, text):
        raise OSError(5, "Input/output error")

    def flush(self):
        raise OSError(5, "Input/output error")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_terminal_that_is_gone_ends_no_work(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(terminal, "console", Terminal(file=Hangup(), force_terminal=True))
    steps = []
    for _ in range(2):
        with working("evaluating", total=1) as done:
            done()
            steps.append(1)
    assert steps == [1, 1]
    with pytest.raises(RuntimeError, match="mine"), working("failing"):
        raise RuntimeError("mine")


# -- the closing table -------------------------------------------------------------------------------------------------


def test_a_program_is_written_as_its_user_types_it(tmp_path, monkeypatch):
    venv = tmp_path / "a b" / ".venv" / "bin"
    venv.mkdir(parents=True)
    python = venv / "python"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path / "a b")
    assert as_typed(python) == ".venv/bin/python"
    monkeypatch.chdir("/")
    assert as_typed(python) == os.path.relpath(python, "/")
    monkeypatch.chdir(venv.parent)
    (venv.parent / "deep").mkdir()
    monkeypatch.chdir(venv.parent / "deep")
    assert as_typed(python) == str(python), "no ../.. in a command"
    monkeypatch.setenv("PATH", f"{venv}:/usr/bin:/bin")
    assert as_typed(python) == "python", "the environment is active"


def test_the_command_to_resume_is_quoted_for_the_shell(tmp_path, monkeypatch):
    from trainer.outcome import how_to_resume

    folder = tmp_path / "my runs" / "it's $HOME"
    (folder / "checkpoints").mkdir(parents=True)
    assert how_to_resume(folder) is None
    monkeypatch.setattr("trainer.outcome.checkpoint.finished", lambda _: [folder])
    monkeypatch.setattr(sys, "argv", ["my recipe.py"])
    python, *words = shlex.split(how_to_resume(folder))
    assert words == ["my recipe.py", "--resume", str(folder)]
    assert python.endswith("python") or "python" in python


def test_the_closing_table_shows_the_advice_and_what_sends_an_offline_run(tmp_path, capsys):
    (tmp_path / "wandb" / "offline-run-1-a").mkdir(parents=True)
    summary = {"name": "t", "status": "finished", "ledger": {}, "advice": ["engine-bound since step 3: ..."]}
    closing_table(summary, tmp_path)
    out = capsys.readouterr().out
    assert "advice: engine-bound since step 3: ..." in out
    (line,) = [line for line in out.splitlines() if "send to W&B with: " in line]
    assert re.search(r"wandb sync \S+/wandb/offline-run-1-a$", line)
    closing_table(summary, tmp_path / "nowhere")
    assert "send to W&B" not in capsys.readouterr().out


def test_the_reader_sees_a_step_at_once_after_it_was_written(run):
    held, reading = checkpoint.lock(run), Reading(run)
    assert reading.refresh() == 5
    append(run / "metrics.jsonl", {"step": 5.0, **ROW})
    assert reading.refresh() == 1
    os.utime(run / "metrics.jsonl", (time.time() - 100, time.time() - 100))
    assert reading.idle_s >= 99
    held.close()
    reading.refresh()
    assert reading.idle_s == 0.0
