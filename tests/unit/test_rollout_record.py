"""The rollout record: why a token did not learn, files that a kill leaves readable, and a thread that blocks nobody."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from cases import nightly_unless
from planted_run import Letters, clipped, row, watched
from rl.config import Config, RolloutConfig
from rl.episodes.seen import Why
from rl.objectives import GRPO
from rl.objectives.corrections import IcePop
from rl.types import Data
from trainer.record import vocabulary, writer
from trainer.record.recorder import RunRecord
from trainer.record.table import Told, shortened, table_of, untold, worst_gaps
from trainer.record.writer import Entry, Writer, entries, tokens
from trainer.view.answers import Answers
from trainer.view.rollouts import Rollouts


def test_each_reason_of_a_token_is_found_where_it_was_planted():
    rows, seen = clipped()
    table = table_of(7, [Told(trajectory=t) for t in rows], [seen])
    found = [[Why(flag) for flag in flags] for flags in table["flags"].to_pylist()]
    nothing = Why(0)
    assert found[0] == [Why.PROMPT, Why.PROMPT, Why.CLIPPED_HIGH | Why.NO_GRADIENT, nothing, nothing]
    assert found[1][2:] == [Why.CLIPPED_LOW | Why.NO_GRADIENT, Why.CLIPPED_DUAL | Why.NO_GRADIENT, nothing]
    assert found[2][2:] == [Why.ZERO_ADVANTAGE | Why.NO_GRADIENT] * 3
    assert found[3][4] == Why.REJECTED | Why.ZERO_ADVANTAGE | Why.NO_GRADIENT
    assert table["gap_max"].to_pylist()[3] == 3.0
    assert worst_gaps(rows, [seen]) == table["gap_max"].to_pylist()
    assert table["silent"].to_pylist() == [1, 2, 3, 3]
    assert table["clip_frac"].to_pylist()[:2] == [pytest.approx(1 / 3), pytest.approx(1 / 3)]


def test_rows_of_one_episode_get_their_own_tokens_back():
    first = row(sampled=2, reward=1.0, turns=[-1, -1, 0, 0])
    second = row(sampled=1, prompt=4, reward=1.0, turns=[-1] * 4 + [1], row=1)
    rows = [first, second, row(episode=1, sampled=2, turns=[-1, -1, 0, 0])]
    seen, _ = watched(rows, [-0.1, -0.2, -0.3, -0.4, -0.5], [-1.0] * 5, GRPO(), IcePop(low=0.0, high=9.0))
    table = table_of(1, [Told(trajectory=t) for t in rows], [seen])
    moved = [x[len(x) - n :] for x, n in zip(table["moved"].to_pylist(), (2, 1, 2), strict=True)]
    flat = [x for each in moved for x in each]
    assert flat == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5], rel=4e-3)


def test_what_is_not_trained_on_says_why():
    read = row(sampled=4)
    read = replace(read, mask=[False, False, True, False, True, True], turns=[-1, -1, 0, -1, 1, 1])
    told = [
        Told(trajectory=replace(row(), trained=False)),
        Told(trajectory=row(group=1)),
        Told(trajectory=read, end="filtered(zero_advantage)"),
        Told(trajectory=untold(9, [4, 5]), end="failed(env_error)", error="no database"),
        Told(trajectory=untold(10, []), end="filtered(too_old)"),
    ]
    table = table_of(2, told, [])
    assert str(worst_gaps([one.trajectory for one in told[:2]], [])) == "[nan, nan]"
    flags = table["flags"].to_pylist()
    assert flags[0][2:] == [Why.MASKED] * 3
    assert flags[1][2:] == [Why.ZERO_ADVANTAGE] * 3  # no pass needed the row
    assert flags[2] == [Why.PROMPT, Why.PROMPT, Why.LEFT_OUT, Why.READ, Why.LEFT_OUT, Why.LEFT_OUT]
    assert table["turns"].to_pylist()[2] == 2
    assert [*zip(table["state"].to_pylist(), table["reason"].to_pylist(), strict=True)][2:] == [
        ("filtered", "zero_advantage"),
        ("failed", "env_error"),
        ("filtered", "too_old"),
    ]
    assert (table["error"].to_pylist()[3], table["ids"].to_pylist()[3]) == ("no database", [4, 5])


def test_short_numbers_keep_three_digits_and_what_is_not_finite():
    x = torch.tensor([1e-7, -3.14159, 0.0, float("inf"), float("nan"), 70000.0]).numpy()
    short = shortened(x, 8)
    assert short[:3] == pytest.approx(x[:3], rel=2e-3)
    assert (short[3], short[5]) == (float("inf"), pytest.approx(70000.0, rel=2e-3))
    assert short[4] != short[4]


def test_a_token_takes_less_than_six_bytes_and_less_than_five_in_a_run_with_one_pass_a_step(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts" / "docs")
    from costs.record import long_replies

    assert 4 < long_replies(tmp_path / "one", moved=0.0) < 5
    assert 5 < long_replies(tmp_path / "several", moved=1e-2) < 6


def written(folder, steps, *, keep="all", most=1e9, alerts=(), sampled=3, after=0):
    one = Writer(folder, keep=keep, most_bytes=most, after=after, alerts=lambda: set(alerts))
    for step in steps:
        one.put((step, [Told(trajectory=row(g, e, sampled + g + e)) for g in range(3) for e in range(2)], []))
        while not one._waiting.empty() and one._thread.is_alive():
            threading.Event().wait(0.001)
    one.close()
    assert one.problem == ""
    return entries(folder)


def test_a_file_that_is_not_whole_is_left_out_at_every_byte(tmp_path):
    kept = written(tmp_path / "rollouts", [1, 2])
    file = tmp_path / "rollouts" / kept[2].file
    data = file.read_bytes()
    for cut in (0, 1, len(data) // 2, len(data) - 1):
        # The writer's own partial file has another name; this one is what a crash of the machine leaves.
        file.write_bytes(data[:cut])
        rollouts = Rollouts(tmp_path)
        rollouts.refresh()
        assert {row["step"] for row in rollouts.find(None)["rows"]} == {1}, cut
        assert rollouts.sequences(2, 0) == []


def test_a_resumed_run_takes_the_steps_after_its_checkpoint_back(tmp_path):
    written(tmp_path, [1, 2, 3])
    (tmp_path / ".step-000004.all.parquet").touch()
    assert [*written(tmp_path, [2], after=1)] == [1, 2]
    assert len([*tmp_path.iterdir()]) == 2, "nothing of later steps, and no partial file, is left"


def test_a_full_folder_is_thinned_from_its_oldest_step_and_alerts_stay(tmp_path):
    size = written(tmp_path / "a", [1], sampled=2000)[1].bytes
    kept = written(tmp_path / "b", [1, 2, 3, 4, 5], most=4.9 * size, alerts=[1], sampled=2000)
    assert {step: each.kept for step, each in kept.items()} == {1: "all", 2: "some", 3: "all", 4: "all", 5: "all"}
    table = pq.read_table(tmp_path / "b" / kept[2].file)
    assert 3 <= len(table) < 6
    assert max(table["tokens"].to_pylist()) == 2003  # the longest
    groups = table["group"].to_pylist()
    assert any(groups.count(g) == 2 for g in groups)  # one group is whole
    kept = written(tmp_path / "c", [1, 2, 3, 4], keep="some")
    assert [each.kept for each in kept.values()] == ["some", "some", "some", "all"]
    kept = written(tmp_path / "d", range(1, 9), most=2.5 * size, sampled=2000)
    assert sum(each.bytes for each in kept.values()) <= 2.5 * size
    assert max(kept) == 8


def test_a_disk_that_hangs_holds_up_no_step_and_is_reported_once(tmp_path, monkeypatch):
    go, alerts = threading.Event(), []
    monkeypatch.setattr(writer, "table_of", lambda *a: go.wait(60) and table_of(*a))
    config = Config(name="t", model="m", data=lambda: Data(train=[]), reward=len)
    record = RunRecord(tmp_path, config, tokenizer=Letters(), after=0, alert=lambda *a: alerts.append(a), alerts=[])
    for step in range(1, 20):
        for state in ("admitted", "sampling", "scoring", "ready", "training", "trained"):
            record.moved(step, state)
        record.trained(step, [row(step)])
    go.set()
    record.close()
    assert [alert[1] for alert in alerts] == ["rollouts cannot be recorded"]
    kept = entries(tmp_path / "rollouts")
    assert 1 in kept
    assert len(kept) <= writer.WAITING + 2
    assert pq.read_table(tmp_path / "rollouts" / kept[1].file)["began"].to_pylist()[0] > 1e9


def test_a_folder_that_cannot_be_written_is_one_alert(tmp_path):
    (tmp_path / "rollouts").write_text("a file where the folder should be")
    alerts = []
    config = Config(name="t", model="m", data=lambda: Data(train=[]), reward=len, rollout=RolloutConfig())
    record = RunRecord(tmp_path, config, tokenizer=Letters(), after=0, alert=lambda *a: alerts.append(a), alerts=[])
    record.trained(1, [row()])
    record.writer.close()
    record.moved(5, "failed(x)")
    record._flush(0)
    assert [alert[1] for alert in alerts] == ["rollouts cannot be recorded"]


def test_a_character_of_several_tokens_is_the_text_of_its_last_one():
    table = vocabulary.token_bytes(Letters())
    text = "a\U0001f600 \u05d0"
    ids = [*text.encode(), 300]
    assert vocabulary.pieces(ids, table) == ["a", "", "", "", "\U0001f600", " ", "", "\u05d0", "<|end|>"]
    assert "".join(vocabulary.pieces([0xF0, 0x9F, 0x41, 0xFF, 0x42], table)) == "A\u27e8255\u27e9B"
    assert vocabulary.pieces([299, 999], table) == ["\u27e8299\u27e9", "\u27e8999\u27e9"]


def test_pieces_with_a_sign_for_the_space_and_for_bytes():
    class Pieces:
        def get_vocab(self):
            return {"\u2581Hi": 0, "<0xE2>": 1, "<0x82>": 2, "<0xAC>": 3, "<s>": 4}

        def get_added_vocab(self):
            return {"<s>": 4}

    table = vocabulary.token_bytes(Pieces())
    assert vocabulary.pieces([4, 0, 1, 2, 3], table) == ["<s>", " Hi", "", "", "\u20ac"]


def test_the_tokens_of_one_row_are_read_alone(tmp_path):
    entry: Entry = written(tmp_path, [4])[4]
    last, first = tokens(tmp_path / entry.file, [3, 0])
    assert (len(last["ids"]), len(first["ids"])) == (2 + 3 + 1 + 1, 2 + 3)
    assert {name: len(values) for name, values in last.items()} == dict.fromkeys(writer.LISTS, 7)
    assert pq.read_schema(tmp_path / entry.file).names[0] == "state"


WRITES = """
import os, sys
from pathlib import Path
from planted_run import row
from trainer.record.table import Told
from trainer.record.writer import Writer

for folder in sys.stdin:
    pid = os.fork()
    if not pid:
        one = Writer(Path(folder.strip()) / "rollouts", keep="some", most_bytes=1e9, after=0, alerts=set)
        step = 0
        while True:
            step += 1
            one._waiting.put((step, [Told(trajectory=row(g)) for g in range(3)], []))
    print(pid, flush=True)
    os.waitpid(pid, 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("writers", nightly_unless(lambda writers: writers == 8, [8, 50]))
def test_writers_that_are_killed_leave_records_that_can_be_read(tmp_path, writers):
    paths = os.pathsep.join([os.getcwd(), str(Path(__file__).parents[1] / "support")])
    command = [sys.executable, "-c", WRITES]
    environment = os.environ | {"PYTHONPATH": paths}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as forks:
        assert forks.stdin is not None
        assert forks.stdout is not None
        for n in range(writers):
            folder = tmp_path / str(n)
            forks.stdin.write(f"{folder}\n")
            forks.stdin.flush()
            pid = int(forks.stdout.readline())
            # Killed at another moment each time: in a file, at its end or between files.
            rollouts = folder / "rollouts"
            while len(entries(rollouts)) <= n // 3:
                threading.Event().wait(0.0005 * (n % 7))
            os.kill(pid, signal.SIGKILL)
            kept = entries(rollouts)
            assert list(kept) == list(range(1, len(kept) + 1)), n
            (folder / "config.json").write_text("{}")
            answers = Answers(folder)
            shown = [step for step, _ in answers.answer("run", {})["steps"]]
            rows = answers.answer("rows", {})["rows"]
            assert shown == sorted({row["step"] for row in rows}) == list(kept), n
            assert all(answers.answer("sequences", {"step": step, "group": rows[0]["group"]}) for step in shown[-1:]), n
        forks.stdin.close()
