"""Sandboxes: what a run returns, what a machine lacks, whose error it is, and the judge of programs."""

import inspect
import json
import os
import statistics
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from boxes import missing
from rl.environments import EnvError, ToolError
from rl.sandbox import Bubblewrap, Ran, Sandbox, SandboxFusion, Unprotected, bubblewrap, probe, seccomp, share_passed
from rl.sandbox.files import PAGE, Held, name

boxed = pytest.mark.skipif(bool(missing()), reason=missing() or "there is a sandbox")
PYTHON = ["python", "-I", "-S", "-c"]


@pytest.fixture(params=[pytest.param(Bubblewrap, marks=boxed), Unprotected])
def sandbox(request):
    made = request.param()
    made.start()
    yield made
    made.stop()


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_returns_what_the_program_did(sandbox):
    program = "import sys; print(input(), open('data/x').read()); print('oh', file=sys.stderr); sys.exit(3)"
    ran = sandbox.run([*PYTHON, program], stdin="given\n", files={"data/x": b"there"})
    assert ran == Ran(stdout="given there\n", stderr="oh\n", code=3)
    assert isinstance(sandbox, Sandbox)


def test_a_signal_and_a_missing_program_are_statuses_of_the_program(sandbox):
    assert sandbox.run(["sh", "-c", "sh -c 'kill -9 $$'; exit $?"]).code == 137
    ran = sandbox.run(["no-such-program"])
    assert (ran.code, ran.well) == (127, False)


def test_written_files_are_in_the_runs_that_follow(sandbox):
    sandbox.write("a/b.txt", "one")
    assert sandbox.read("a/b.txt") == b"one"
    assert sandbox.run(["cat", "a/b.txt"]).stdout == "one"
    with pytest.raises(ToolError, match="none"):
        sandbox.read("none")


def test_output_that_is_not_utf8_is_replaced(sandbox):
    assert sandbox.run([*PYTHON, "import os; os.write(1, b'a\\xff')"]).stdout == "a\ufffd"


@boxed
def test_files_that_a_program_leaves_are_kept_if_asked_for_and_lost_at_a_limit():
    kept, not_kept = Bubblewrap(keep=True), Bubblewrap()
    for box in (kept, not_kept):
        box.write("old", "x")
        box.run(["sh", "-c", "echo new > made; rm old"])
    assert (kept.files, not_kept.files) == ({"made": b"new\n"}, {"old": b"x"})
    assert kept.run(["sh", "-c", "rm made; sleep 60"], timeout=0.3).timed_out
    assert kept.run(["cat", "made"]).stdout == "new\n"
    assert kept.run(["sh", "-c", "exit 7"]).code == 7
    lost = kept.run(["sh", "-c", "for i in $(seq 600); do : > $i; done"])
    assert "at most 512 files" in lost.stderr
    assert kept.files == {"made": b"new\n"}
    kept.stop()
    assert kept.files == {}


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a\0b", "x" * 256, "a/" * 600 + "x"])
def test_a_path_that_no_box_can_hold_is_an_error_of_the_policy(path):
    with pytest.raises(ToolError, match="relative path"):
        name(path)


@pytest.mark.parametrize(
    "files",
    [
        {"a": "x", "a/b": "y"},
        {str(i): "" for i in range(600)},
        {"big": bytes(5 << 20)},
        {str(i): "x" for i in range(300)},
    ],
    ids=["a file that is a folder", "too many", "too large", "too many pages"],
)
def test_files_that_no_box_can_hold_are_an_error_of_the_policy(files):
    room = 1 if len(files) == 300 else 4
    with pytest.raises(ToolError):
        Held(disk_mib=room).placed(files)


@pytest.mark.parametrize("argv", [[], ["a\0b"], ["x" * 200_000]], ids=["none", "NUL", "long"])
def test_a_command_that_no_system_takes_is_an_error_of_the_policy(argv, sandbox):
    with pytest.raises(ToolError, match="a command needs"):
        sandbox.run(argv)


@pytest.mark.parametrize("name", ["disk_mib", "memory_mib", "processes", "output_kib"])
def test_a_limit_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        Bubblewrap(**{name: 0})


def test_an_interpreter_without_a_folder_is_refused():
    with pytest.raises(ValueError, match="python='python3' must be a whole path"):
        Bubblewrap(python="python3")


@boxed
@pytest.mark.parametrize("room", [1, 4])
def test_what_fits_by_the_count_fits_into_the_box(room):
    """Else a full folder would be an error of the sandbox, and the policy could cause it."""
    files = {f"{i}/{'y' * 200}": b"x" * 5000 for i in range(room * (1 << 20) // PAGE // 4 - 1)}
    ran = Bubblewrap(disk_mib=room).run(["sh", "-c", "ls | wc -l"], files=files)
    assert int(ran.stdout) == len(files)


@boxed
def test_lone_surrogates_are_replaced_and_no_error_of_the_sandbox():
    ran = Bubblewrap().run([*PYTHON, "print(open('a?').read(), '\udcff')"], files={"a\udcff": "b\ud800"})
    assert ran.stdout == "b? ?\n"


@boxed
@pytest.mark.serial
def test_a_box_costs_no_more_than_25_ms(capsys):
    """What a run takes longer than the interpreter alone. The least of 21, because other processes only add to it."""
    box, alone, program = Bubblewrap(), Unprotected(), [*PYTHON, "print(1)"]
    box.start()
    took: dict[object, list[float]] = {box: [], alone: []}
    for sandbox in (box, alone) * 21:
        began = time.perf_counter()
        assert sandbox.run(program).stdout == "1\n"
        took[sandbox].append(1000 * (time.perf_counter() - began))
    boxed, bare = (round(statistics.median(took[each]), 1) for each in (box, alone))
    with capsys.disabled():
        print(f"\na run: {boxed} ms in a box, {bare} ms without one (medians of 21)")
    assert min(took[box]) - min(took[alone]) <= 25


# -- what a machine lacks ----------------------------------------------------------------------------------------------


def program(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A PATH with programs of one's own, for a user that is root."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    program(tmp_path, "bwrap", "echo bubblewrap 0.8.0")
    program(tmp_path, "prlimit", "")
    program(tmp_path, "setpriv", "")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("bwrap", "bwrap is not installed: apt-get install bubblewrap"),
        ("prlimit", "prlimit is not installed: apt-get install util-linux"),
        ("setpriv", "setpriv is not installed: apt-get install util-linux"),
    ],
)
def test_a_program_that_is_not_installed_is_named(name, remedy, path):
    assert probe.tools_here().bwrap == str(path / "bwrap")
    (path / name).unlink()
    with pytest.raises(ValueError, match=rf"no sandbox on this machine: {remedy}.*Unprotected\(\)"):
        probe.tools_here()


def test_only_root_needs_setpriv(path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (path / "setpriv").unlink()
    assert probe.tools_here().setpriv == ""


def test_an_old_bubblewrap_is_named(path):
    program(path, "bwrap", "echo bubblewrap 0.6.2")
    with pytest.raises(ValueError, match=r"bubblewrap 0\.6\.2 has no --disable-userns: install version 0\.8"):
        probe.tools_here()


MACHINES = {
    "sysctl": ({"sys/user/max_user_namespaces": "0"}, "No space left", "sysctl -w user.max_user_namespaces"),
    "debian": ({"sys/kernel/unprivileged_userns_clone": "0"}, "not permitted", "kernel.unprivileged_userns_clone=1"),
    "ubuntu": ({"sys/kernel/apparmor_restrict_unprivileged_userns": "1"}, "not permitted", "AppArmor profile"),
    "docker": ({"self/status": "Name:\tx\nSeccomp:\t2\n"}, "Creating new namespace failed", "seccomp=unconfined"),
    "masked": ({}, "bwrap: Can't mount proc on /newroot/proc: Operation not permitted", "systempaths=unconfined"),
    "other": ({}, "bwrap: something new", "something new"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_what_forbids_user_namespaces_is_named(machine, tmp_path):
    files, written, remedy = MACHINES[machine]
    for file, text in ({"self/status": "Seccomp:\t0\n"} | files).items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    cause = probe.cause(written.encode(), tmp_path)
    assert remedy in cause
    assert written.split()[-1] in cause


@boxed
def test_a_box_that_does_not_start_is_a_refusal_at_start_and_later_an_error_of_the_environment(monkeypatch):
    box = Bubblewrap(readable=("/no/such/folder",))
    with pytest.raises(ValueError, match=r"no sandbox on this machine: .*no/such/folder.*Unprotected"):
        box.start()
    monkeypatch.setattr(bubblewrap, "found", lambda box: (probe.tools_here(), "/usr/bin/python3"))
    with pytest.raises(EnvError, match=r"a box did not start: .*no/such/folder"):
        box.run(["true"])


@boxed
def test_an_interpreter_that_the_box_cannot_read_is_named(tmp_path):
    tmp_path.chmod(0o700)
    with pytest.raises(ValueError, match=r"no sandbox on this machine"):
        Bubblewrap(python=str(tmp_path / "bin" / "python3")).start()
    with pytest.raises(ValueError, match=r"no Python works in it.*apt-get install python3"):
        Bubblewrap(python="/usr/bin/no-python").start()


def test_a_command_that_cannot_be_started_is_an_error_of_the_environment(monkeypatch):
    monkeypatch.setattr(
        bubblewrap, "found", lambda box: (probe.Tools("/no/bwrap", "/no/prlimit", ""), "/usr/bin/python3")
    )
    with pytest.raises(EnvError, match="a sandbox cannot be started"):
        Bubblewrap().run(["true"])


def test_a_machine_without_a_list_of_system_calls_is_refused():
    with pytest.raises(ValueError, match="x86_64 and aarch64, not riscv64"):
        seccomp.deny("riscv64")
    assert len(seccomp.deny("aarch64")) == len(seccomp.deny("x86_64")) > 8 * len(seccomp.CALLS.split()) // 3


# -- the judge ---------------------------------------------------------------------------------------------------------

DOUBLES = [("1", "2"), ("21", "42\n"), ("-3", "-6")]
HACKS = {
    "a file with the reward": "open('reward.txt', 'w').write('1'); open('/tmp/reward.txt', 'w').write('1.0')",
    "a status of 0": "import os; os._exit(0)",
    "words": "print('3 passed'); print('OK'); print('PASSED')",
    "equality": "class A(str):\n def __eq__(self, o): return True\n __hash__ = str.__hash__\nprint(A('x'))",
    "builtins": "import builtins; builtins.print = lambda *a: None; str.__eq__ = lambda a, b: True",
    "all the answers": "print('2\\n42\\n-6')",
    "nan": "print(float('nan'))",
    "the test runner": "import sys, types; sys.modules['pytest'] = types.ModuleType('pytest'); sys.exit(0)",
    "the right output and a crash": "print(2 * int(input())); raise SystemExit(1)",
    "the right output and no end": "print(2 * int(input()), flush=True)\nwhile True: pass",
    "what other processes got": "import glob\nfor path in glob.glob('/proc/*/cmdline'): print(open(path).read())",
    "nothing": "",
    "no Python": "I think the answer is 2",
    "a NUL": "print(3)\0",
}


@boxed
def test_the_share_of_cases_is_what_a_program_earns():
    assert share_passed(Bubblewrap, "print(2 * int(input()))", DOUBLES) == 1.0
    assert share_passed(Bubblewrap, "print(abs(2 * int(input())), ' ')", DOUBLES) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least one case"):
        share_passed(Bubblewrap, "print(1)", [])
    users = inspect.unwrap(share_passed)  # without the tests' own check of types
    with pytest.raises(TypeError, match="give it Bubblewrap, or lambda"):
        users(Bubblewrap(), "print(1)", DOUBLES)
    with pytest.raises(TypeError, match=r"two texts.*this one is \(3, 6\)"):
        users(Bubblewrap, "print(1)", [(3, 6)])


@boxed
@pytest.mark.parametrize("hack", HACKS)
def test_nothing_but_the_right_output_earns(hack):
    assert share_passed(Bubblewrap, HACKS[hack], DOUBLES, seconds=0.5) == 0.0


class Recorded:
    """A sandbox that another one is: it keeps what came in."""

    def __init__(self) -> None:
        self.runs, self.story = [], []

    def start(self):
        self.story.append("start")

    def run(self, argv, *, stdin="", files=None, timeout=10.0):
        self.story.append("run")
        self.runs.append((argv, stdin, files, timeout))
        if stdin == "fail":
            raise EnvError("gone")
        return Ran(stdout="", stderr="", code=0)

    def stop(self):
        self.story.append("stop")

    def read(self, path):
        return b""

    def write(self, path, content):
        pass


class Hanging(Recorded):
    """A sandbox in which one input is answered, and any other one takes for ever."""

    runs_of_all = 0

    def run(self, argv, *, stdin="", files=None, timeout=10.0):
        Hanging.runs_of_all += 1
        return Ran(stdout="2\n", stderr="", code=0 if stdin == "1" else 137, timed_out=stdin != "1")


def test_a_program_that_hangs_three_times_has_not_passed_the_other_cases():
    given = ["1", "0", "0", "1", "0", "1", "0"]
    assert share_passed(Hanging, "program", [(each, "2") for each in given]) == pytest.approx(2 / 7)
    assert Hanging.runs_of_all == 5, "the policy decides how long a reward takes"


def test_no_answer_enters_a_sandbox_and_each_case_has_a_new_one():
    made = []
    share_passed(lambda: made.append(Recorded()) or made[-1], "program", [("1", "secret"), ("2", "secret")])
    assert len(made) == 2
    assert "secret" not in repr([box.runs for box in made])
    assert [box.story for box in made] == [["start", "run", "stop"]] * 2


def test_an_error_of_the_sandbox_is_no_verdict():
    box = Recorded()
    with pytest.raises(EnvError, match="gone"):
        share_passed(lambda: box, "program", [("fail", "")])
    assert box.story == ["start", "run", "stop"]


# -- SandboxFusion -----------------------------------------------------------------------------------------------------


class Server:
    """A server that gives these answers, one after the other, and keeps what it was asked."""

    def __init__(self, answers):
        outer, self.asked, self.answers = self, [], list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.asked.append((self.path, json.loads(body)))
                status, answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/"


@pytest.fixture
def fusion(monkeypatch):
    monkeypatch.setattr("rl.sandbox.fusion.FIRST_PAUSE_S", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def serve(*answers):
        servers.append(Server(answers))
        return servers[-1]

    yield serve
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def finished(code=0, **more):
    result = {"status": "Finished", "return_code": code, "stdout": "out", "stderr": "err", **more}
    return {"status": "Success" if code == 0 else "Failed", "message": "", "run_result": result}


def test_a_run_on_a_server_is_one_request(fusion):
    server = fusion((200, finished(code=3)))
    sandbox = SandboxFusion(url=server.url)
    sandbox.start()
    sandbox.write("b", "data")
    ran = sandbox.run(["python", "main.py", "a b"], stdin="in", files={"main.py": "print()"}, timeout=7.0)
    assert ran == Ran(stdout="out", stderr="err", code=3)
    ((path, body),) = server.asked
    assert path == "/run_code"
    assert body["code"] == "python main.py 'a b'"
    assert (body["language"], body["stdin"], body["run_timeout"]) == ("bash", "in", 7.0)
    assert body["files"] == {"b": "ZGF0YQ==", "main.py": "cHJpbnQoKQ=="}
    assert sandbox.read("b") == b"data"


def test_a_program_that_is_late_on_a_server_is_an_observation(fusion):
    late = {"status": "Failed", "run_result": {"status": "TimeLimitExceeded", "return_code": None, "stdout": "x"}}
    ran = SandboxFusion(url=fusion((200, late)).url).run(["python", "x"])
    assert ran == Ran(stdout="x", stderr="", code=137, timed_out=True)


@pytest.mark.parametrize(
    "busy",
    [
        (429, b""),
        (500, b""),
        (503, b"later"),
        (200, b"<html>"),
        (200, []),
        (200, {"status": "SandboxError", "message": "no pod", "run_result": None}),
        (200, {"status": "SandboxError", "run_result": {"status": "Error", "return_code": 1}}),
    ],
    ids=["429", "500", "503", "no JSON", "a list", "no pod", "an error"],
)
def test_a_busy_or_failing_server_is_asked_again_and_never_scored(busy, fusion):
    server = fusion(busy, busy, (200, finished()))
    assert SandboxFusion(url=server.url).run(["true"]).code == 0
    assert len(server.asked) == 3
    with pytest.raises(EnvError, match=r"failed for 0\.05 s"):
        SandboxFusion(url=fusion(busy).url, patience_s=0.05).run(["true"], timeout=0.0)


def test_a_request_that_the_server_refuses_is_not_repeated(fusion):
    server = fusion((422, b""))
    with pytest.raises(EnvError, match="refuses the request: HTTP Error 422"):
        SandboxFusion(url=server.url).run(["true"])
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_an_error_of_the_environment(fusion):
    server = fusion((200, finished()))
    server.http.server_close()
    with pytest.raises(EnvError, match="failed for"):
        SandboxFusion(url=server.url, patience_s=0.05).run(["true"], timeout=0.0)
