"""`unison view` without a browser: its answers, its server, its export, and a million rows."""

import base64
import http.client
import json
import socket
import struct
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pytest

from planted_run import planted, row, write
from trainer.commands.view import view
from trainer.record.table import SCHEMA, Told
from trainer.record.writer import Entry
from trainer.runs import checkpoint
from trainer.view.answers import Answers
from trainer.view.rollouts import Rollouts
from trainer.view.server import HERE, export, server


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return planted(tmp_path_factory.mktemp("runs") / "planted")


def found(answers, **asked):
    return answers.answer("rows", {"step": "7", **asked})


def test_rows_are_filtered_by_numbers_states_and_words(run):
    answers = Answers(run)
    assert found(answers)["total"] == 17
    assert {r["reason"] for r in found(answers, where="state=filtered")["rows"]} >= {"too_old", "zero_advantage"}
    assert [r["group"] for r in found(answers, where="clip_frac>0.3")["rows"]] == [0, 0]
    assert [r["group"] for r in found(answers, where="database")["rows"]] == [16]
    rows = found(answers, sort="gap_max", falling="1")["rows"]
    assert rows[0]["gap_max"] == 3.0
    assert rows[-1]["gap_max"] is None  # unknown last
    assert found(answers, sort="gap_max")["rows"][-1]["gap_max"] is None
    text = "".join(answers.answer("sequences", {"step": "7", "group": "0"})[0]["text"])
    assert len(text) == 5
    assert 0 in {r["group"] for r in found(answers, where=text[1:4])["rows"]}
    for wrong in ({"where": "nothing<3"}, {"where": "reward<much"}, {"sort": "nothing"}):
        with pytest.raises(ValueError, match=r"no column|no number"):
            found(answers, **wrong)


def test_of_all_steps_only_the_columns_that_decide_are_read_and_a_step_made_again_is_read_again(tmp_path):
    rewards = {1: [0.5], 2: [0.75, 0.25], 3: [0.0]}
    write(tmp_path, {s: ([Told(trajectory=row(reward=r)) for r in of], []) for s, of in rewards.items()})
    answers = Answers(tmp_path)

    def best(**asked):
        found = answers.answer("rows", {"sort": "reward", "falling": "1", "limit": "2", **asked})
        return [(r["step"], r["reward"], r["state"]) for r in found["rows"]], found["total"]

    assert best() == ([(2, 0.75, "trained"), (1, 0.5, "trained")], 4)
    held = {entry.step: set(columns) for entry, columns in answers.rollouts.files.items()}
    assert held[3] == {"", "place", "step", "reward"}
    assert held[2] > {"state", "parts", "gap_max"}
    assert best(where="reward<0.6 trained") == ([(1, 0.5, "trained"), (2, 0.25, "trained")], 3)
    write(tmp_path, {1: ([Told(trajectory=row(reward=r)) for r in (2.0, 3.0)], [])})
    assert best() == ([(1, 3.0, "trained"), (1, 2.0, "trained")], 5)


def test_a_run_that_goes_on_is_followed_and_a_dead_one_is_read(run, tmp_path):
    folder = tmp_path / "live"
    write(folder, {1: ([Told(trajectory=row())], [])})
    (folder / "alerts.jsonl").write_text('{"step": 1, "title": "a", "text": "b"}\n')
    answers = Answers(folder)
    before = answers.answer("pulse", {})
    assert [step[0] for step in answers.answer("run", {})["steps"]] == [1]
    write(folder, {2: ([Told(trajectory=row())], [])})
    assert answers.answer("pulse", {}) != before
    assert [step[0] for step in answers.answer("run", {})["steps"]] == [1, 2]
    assert answers.answer("run", {})["status"] == "killed"
    with checkpoint.lock(folder):
        assert answers.answer("run", {})["status"] == "running"
    # Whatever byte a kill left as the last one, the run can be read.
    for name in ("metrics.jsonl", "alerts.jsonl"):
        text = (folder / name).read_bytes()
        for cut in range(len(text) // 2 + 1, len(text)):
            (folder / name).write_bytes(text[:cut])
            assert Answers(folder).answer("run", {})["name"] == "live"
        (folder / name).write_bytes(text)


def ask(url, path="", **headers):
    parts = urlsplit(url)
    link = http.client.HTTPConnection(parts.netloc)
    link.request("GET", parts.path + path, headers=headers)
    answer = link.getresponse()
    return answer.status, answer.headers, answer.read()


def test_only_who_has_the_address_gets_an_answer_and_no_script_of_others_runs(run):
    made, url = server(Answers(run))
    threading.Thread(target=made.serve_forever, daemon=True).start()
    try:
        assert urlsplit(url).hostname == "127.0.0.1"
        status, headers, body = ask(url)
        assert status == 200
        assert b"<script src=" in body
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        status, _, body = ask(url, "rows?step=7&where=state=failed")
        assert (status, json.loads(body)["total"]) == (200, 4)
        root = f"http://{urlsplit(url).netloc}/"
        for wrong in (root, root + "run", root + "x" * 24 + "/run"):
            assert ask(wrong)[0] == 404
        assert ask(url, "run", Host="elsewhere.example")[0] == 404
        assert ask(url, "nothing")[0] == 404
        assert ask(url, "../page.html")[0] == 404
        status, _, body = ask(url, "rows?where=nothing<3")
        assert (status, b"no column" in body) == (400, True)
    finally:
        made.shutdown()
        made.server_close()


def test_a_browser_that_leaves_before_its_answer_prints_nothing(run, capfd):
    made, url = server(Answers(run))
    parts, gone = urlsplit(url), threading.Event()
    answer = made.RequestHandlerClass.do_GET

    def late(self):
        assert gone.wait(300)
        for _ in range(2):  # the first write is answered by a reset, the second meets it
            answer(self)

    made.RequestHandlerClass.do_GET = late
    # Its own thread: the server waits for no other.
    made.daemon_threads = False
    threading.Thread(target=made.serve_forever, daemon=True).start()
    link = socket.create_connection((parts.hostname, parts.port))
    link.sendall(f"GET {parts.path}rows?limit=5000 HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    link.close()
    gone.set()
    made.shutdown()
    made.server_close()  # waits for the answer
    assert capfd.readouterr().err == ""


def test_an_export_has_the_page_and_its_data_and_ends_no_script_early(run, tmp_path):
    assert view([str(run), "--export", str(tmp_path / "a.html")]) == 0
    page = (tmp_path / "a.html").read_text()
    assert page.count("</script>") == 2
    assert '<link rel="stylesheet"' not in page
    assert view([str(run), "--export", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["traceEvents"]
    with pytest.raises(ValueError, match="must end in"):
        view([str(run), "--export", str(tmp_path / "a.txt")])
    with pytest.raises(ValueError, match="no folder of a run"):
        view([str(tmp_path), "--export", str(tmp_path / "b.html")])


def test_the_page_without_data_is_small_and_names_no_other_host():
    parts = [path.read_text() for path in HERE.glob("*.*") if path.suffix in (".html", ".js", ".css")]
    assert len(parts) == 3
    assert sum(map(len, parts)) <= 250_000
    for part in parts:
        hosts = part.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in hosts
        assert "https://" not in hosts
        assert "innerHTML" not in part
        assert "eval(" not in part


def test_two_runs_differ_in_a_setting_a_step_and_the_replies_to_one_prompt(tmp_path):
    runs = []
    for name, rewards, lr in (("a", (0.2, 0.2, 0.2), 1), ("b", (0.2, 0.21, 0.6), 2)):
        folder = tmp_path / name
        write(folder, {step: ([Told(trajectory=row(step, reward=float(step)))], []) for step in (1, 2, 3)})
        rows = [{"step": float(i), "reward/mean": r, "reward/std": 0.1} for i, r in enumerate(rewards, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        config = {"name": name, "prompts_per_step": 4, "group_size": 4, "trainer": {"lr": lr}}
        (folder / "config.json").write_text(json.dumps(config))
        runs.append(folder)
    found = Answers(*runs).answer("compare", {})
    # 16 samples: standard error 0.025 each, 0.106 between three of them.
    assert found["parted"] == {"reward/mean": 3}
    assert ["trainer.lr", 1, 2] in found["settings"]
    first, second = (np.frombuffer(base64.b64decode(each[0]["ids"][1]), np.int32) for each in found["prompt"])
    assert first[:2].tolist() == second[:2].tolist()
    assert found["prompt"][0][0]["ids"][0] == "Int32Array"
    assert "compare" in export(Answers(*runs))


@pytest.mark.slow
def test_a_million_rows_are_searched_and_sorted_within_a_second(tmp_path):
    rollouts, n = Rollouts(tmp_path), 1000
    rng = np.random.default_rng(0)
    for step in range(n):
        columns = {}
        for field in SCHEMA:
            if pa.types.is_floating(field.type):
                columns[field.name] = rng.random(1000)
            elif pa.types.is_integer(field.type):
                columns[field.name] = rng.integers(0, 1000, 1000)
            elif pa.types.is_string(field.type):
                columns[field.name] = ["trained"] * 1000
            elif pa.types.is_boolean(field.type):
                columns[field.name] = [False] * 1000
        table = pa.table({**columns, "step": np.full(1000, step), "place": np.arange(1000)})
        entry = rollouts.entries[step] = Entry(step=step, file=str(step), bytes=0, kept="all")
        rollouts.files[entry] = dict(zip(table.column_names, table.columns, strict=True))
    seconds = []
    for where, sort in (("reward<0.001", ""), ("", "gap_max"), ("entropy>0.5 tokens=7", "reward")):
        began = time.process_time()
        answer = rollouts.find(None, where, sort, falling=True)
        seconds.append(time.process_time() - began)
        assert answer["rows"]
    print("CPU seconds", [round(s, 3) for s in seconds])
    assert max(seconds) < 1.0, "CPU seconds of all threads: other work on the machine changes them little"
    assert rollouts.find(None, "")["total"] == 1_000_000
