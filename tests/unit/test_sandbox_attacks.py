"""What a hostile program tries in a box, made by root and made by nobody. Each attack works without one."""

import contextlib
import os
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from boxes import AsNobody, Here, missing
from rl.environments.types import ToolError
from rl.sandbox import Bubblewrap, Ran, Unprotected
from rl.sandbox.bubblewrap import listed

PYTHON = ["python", "-I", "-S", "-c"]


@pytest.fixture(scope="module", params=["by the user of the tests", "by nobody"])
def box(request):
    """A function that runs a program in a new box."""
    if why := missing():
        pytest.skip(why)
    if request.param == "by nobody" and os.geteuid() != 0:
        pytest.skip("only root can become nobody")
    maker = AsNobody() if request.param == "by nobody" else Here()
    yield lambda program, *arguments, **more: maker.run([*PYTHON, program, *map(str, arguments)], **more)
    maker.close()


@pytest.fixture
def unprotected():
    """The same without a box."""
    sandbox = Unprotected()
    sandbox.start()
    yield lambda program, *arguments, **more: sandbox.run([*PYTHON, program, *map(str, arguments)], **more)
    sandbox.stop()


@pytest.fixture
def secret():
    """A file of the machine that every user may read and write."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = Path(folder) / "answers.txt"
        path.write_text("forty-two")
        path.chmod(0o666)
        yield path


def ended_well(ran):
    assert isinstance(ran, Ran), repr(ran)
    assert (ran.code, ran.timed_out, ran.truncated) == (0, False, False), ran.stderr
    return ran.stdout


READ = """
import sys
try:
    print(open(sys.argv[1]).read())
except OSError as error:
    print(type(error).__name__)
"""


def test_the_answers_of_the_driver_cannot_be_read(box, unprotected, secret):
    assert ended_well(unprotected(READ, secret)) == "forty-two\n"
    assert ended_well(box(READ, secret)) == "FileNotFoundError\n"


WRITE = """
import os, sys
try:
    os.makedirs(os.path.dirname(sys.argv[1]), exist_ok=True)
    open(sys.argv[1], "w").write("hacked")
    os.unlink(os.path.dirname(sys.argv[1]) + "/other")
except OSError:
    pass
"""


def test_no_file_of_the_machine_can_be_written_or_removed(box, unprotected, secret):
    (secret.parent / "other").write_text("")
    ended_well(box(WRITE, secret))
    assert secret.read_text() == "forty-two"
    assert (secret.parent / "other").exists()
    ended_well(unprotected(WRITE, secret))
    assert secret.read_text() == "hacked"
    assert not (secret.parent / "other").exists()


ENVIRON = """
import os
names = set()
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        names |= {line.partition("=")[0] for line in open(f"/proc/{pid}/environ").read().split("\\0")}
    except OSError:
        pass
print(" ".join(sorted(names)))
"""


def test_no_environment_of_another_process_can_be_read(box, unprotected):
    assert set(ended_well(box(ENVIRON)).split()) == {"HOME", "LANG", "PATH", "PWD"}
    assert len(ended_well(unprotected(ENVIRON)).split()) > 4


CONNECT = """
import socket, sys
for family, address in ((socket.AF_INET, ("127.0.0.1", int(sys.argv[1]))), (socket.AF_UNIX, "\\0" + sys.argv[2])):
    try:
        with socket.socket(family) as s:
            s.settimeout(1)
            s.connect(address)
            print("connected")
    except OSError as error:
        print(type(error).__name__)
"""


def test_no_port_of_the_machine_can_be_reached(box, unprotected):
    name = f"unison-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as port, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0" + name)
        local.listen()
        arguments = port.getsockname()[1], name
        assert ended_well(unprotected(CONNECT.replace("import ", "import sys, "), *arguments)) == "connected\n" * 2
        assert "connected" not in ended_well(box(CONNECT, *arguments))


FORKS = """
import os, time
made = 0
for _ in range(400):
    try:
        if not os.fork():
            time.sleep(60)
            os._exit(0)
        made += 1
    except BlockingIOError:
        break
print(made)
"""


def test_a_fork_bomb_ends_at_the_limit_of_its_own_box(box):
    assert int(ended_well(box(FORKS))) == 31


def test_boxes_at_the_same_time_do_not_count_each_others_processes():
    if why := missing():
        pytest.skip(why)
    made: list[Ran] = []
    threads = [threading.Thread(target=lambda: made.append(Here().run([*PYTHON, FORKS]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [int(ended_well(ran)) for ran in made] == [31] * 4


def test_memory_of_one_process_has_a_limit(box):
    ran = box("held = bytearray(1 << 30)")
    assert ran.code == 1
    assert "MemoryError" in ran.stderr


HOLD = """
import os, time
for _ in range(4):
    if not os.fork():
        held = bytearray(os.urandom(4096)) * 10_000
        time.sleep(60)
time.sleep(60)
"""


def test_memory_of_several_processes_has_a_limit_together(box):
    ran = box(HOLD, settings={"memory_mib": 100}, timeout=30.0)
    assert (ran.code, ran.timed_out) == (137, False)
    assert "more than 100 MiB" in ran.stderr


SHARED = """
import os, time
held = bytearray(os.urandom(4096)) * 15_000
for _ in range(4):
    if not os.fork():
        time.sleep(0.3)
        os._exit(0)
for _ in range(4):
    os.wait()
"""


def test_pages_that_processes_share_count_once(box):
    ended_well(box(SHARED, settings={"memory_mib": 100}))


CROWD = """
import os
for index in range(10_000_000):
    os.close(os.open(f"/tmp/{index}", os.O_CREAT | os.O_WRONLY))
"""


def test_empty_files_are_memory_too(box):
    ran = box(CROWD, settings={"memory_mib": 40}, timeout=60.0)
    assert (ran.code, ran.timed_out) == (137, False)
    assert "more than 40 MiB" in ran.stderr


UNCOUNTED = """
import ctypes, os
libc, x86 = ctypes.CDLL(None, use_errno=True), os.uname().machine == "x86_64"
for call in (
    lambda: libc.shmget(0, 1 << 20, 0o1600),
    lambda: libc.msgget(0, 0o1600),
    lambda: libc.memfd_create(b"x", 0),
    lambda: libc.ptrace(16, os.getppid(), 0, 0),
    lambda: libc.ptrace(0, 0, 0, 0),
    lambda: libc.unshare(0x10000000),
    lambda: libc.setns(0, 0),
    lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
    lambda: libc.syscall(250 if x86 else 219, 0, -3, 0),
    lambda: libc.syscall(425, 1, 0),
    lambda: libc.syscall(0x40000000 + 39 if x86 else 425, 1, 0),
):
    print(call(), os.strerror(ctypes.get_errno()))
"""


def test_calls_that_reach_other_processes_or_uncounted_memory_fail(box):
    assert ended_well(box(UNCOUNTED)).splitlines() == ["-1 Operation not permitted"] * 11


FAMILIES = """
import socket
for family in range(64):
    for call in (socket.socket, socket.socketpair):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
            try:
                call(family, kind)
                print(family)
                break
            except OSError:
                pass
"""


def test_no_socket_of_a_family_that_no_network_namespace_holds_can_be_opened(box, unprotected):
    opened = {int(line) for line in ended_well(box(FAMILIES)).split()}
    assert opened <= {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK}
    assert socket.AF_UNIX in opened, "programs that talk to their own processes work"
    assert opened < {int(line) for line in ended_well(unprotected(FAMILIES)).split()}


BUFFERS = """
import socket
pair = socket.socketpair()
print([pair[0].getsockopt(socket.SOL_SOCKET, option) for option in (7, 8)])
for option in (7, 8, 32, 33):
    try:
        pair[0].setsockopt(socket.SOL_SOCKET, option, 1 << 24)
        print("larger")
    except PermissionError:
        print("refused")
pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
"""


def test_no_buffer_of_a_socket_can_be_made_larger(box, unprotected):
    assert ended_well(box(BUFFERS)).splitlines()[1:] == ["refused"] * 4
    assert "larger" in unprotected(BUFFERS).stdout


NESTED = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
number = 56 if os.uname().machine == "x86_64" else 220
pid = libc.syscall(number, 0x10000000 | 17, 0, 0, 0, 0)
if pid == 0:
    os._exit(0)
print("made" if pid > 0 else os.strerror(ctypes.get_errno()))
"""


def test_no_user_namespace_can_be_made_in_a_box(box, unprotected):
    assert ended_well(unprotected(NESTED)) == "made\n"
    assert ended_well(box(NESTED)) != "made\n"


FILL = """
import os
written = 0
for folder in ("/work", "/tmp", "/dev/shm", "/", "/dev", "/usr", "/proc", "/etc", "/dev/pts", "/home", "/var"):
    for index in range(20):
        try:
            fd = os.open(f"{folder}/{index}", os.O_CREAT | os.O_WRONLY)
            while True:
                written += os.write(fd, bytes(1 << 20))
        except OSError:
            pass
print(written >> 20)
"""


def test_many_files_fill_no_more_than_the_room_of_a_box(box):
    assert int(ended_well(box(FILL, settings={"disk_mib": 4}))) in range(3, 13)


DAEMON = """
import os, sys, signal, time
if not os.fork():
    os.setsid()
    if not os.fork():
        for number in (1, 2, 13, 15):
            signal.signal(number, signal.SIG_IGN)
        os.execv("/usr/bin/sleep", ["sleep", sys.argv[1]])
    os._exit(0)
os.wait()
if sys.argv[2] == "stay":
    os.close(1), os.close(2)
    time.sleep(60)
"""


def alive(word):
    """The processes of the machine that sleep for so many seconds."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes() == b"sleep\0" + word.encode() + b"\0":
                found.append(int(path.parent.name))
    return found


def gone(word):
    until = time.monotonic() + 30
    while alive(word):
        assert time.monotonic() < until
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("main", ["leave", "stay"])
def test_no_daemon_survives_its_program(box, main):
    word = f"{os.getpid()}{time.monotonic_ns() % 10**6}.25"
    ran = box(DAEMON, word, main, timeout=60.0 if main == "leave" else 0.5)
    assert (ran.timed_out, ran.code) == ((False, 0) if main == "leave" else (True, 137))
    assert gone(word)


def test_a_daemon_of_an_unprotected_program_survives(unprotected):
    word = f"{os.getpid()}9.25"
    ended_well(unprotected(DAEMON, word, "leave"))
    until = time.monotonic() + 30
    while not alive(word):
        assert time.monotonic() < until
    (daemon,) = alive(word)
    os.kill(daemon, 9)
    assert gone(word)


def test_no_box_outlives_a_driver_that_is_killed():
    if why := missing():
        pytest.skip(why)
    word = f"{os.getpid()}7.25"
    driver = os.fork()
    if not driver:
        Here().run(["sleep", word], timeout=60.0)
        os._exit(0)
    until = time.monotonic() + 30
    while not alive(word):
        assert time.monotonic() < until
    os.kill(driver, 9)
    os.waitpid(driver, 0)
    assert gone(word)


KILL = """
import os, sys
for pid in (int(sys.argv[1]), int(sys.argv[2]), -1, 1, os.getppid()):
    try:
        os.kill(pid, 9)
    except OSError:
        pass
print("end")
"""


def test_no_signal_reaches_a_process_of_the_machine(box):
    victim = subprocess.Popen(["sleep", "60"], preexec_fn=lambda: os.geteuid() == 0 and os.setuid(65534))
    try:
        assert ended_well(box(KILL, victim.pid, os.getpid())) == "end\n"
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


DEVICES = """
import os
print(*sorted(os.listdir("/dev")))
for path, kind in (("disk", 0o060666), ("/tmp/mem", 0o020666)):
    try:
        os.mknod(path, kind, os.makedev(1, 1))
        print("made")
    except OSError:
        pass
"""


def test_a_box_has_no_device_but_the_harmless_ones(box):
    harmless = "console core fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"
    assert set(ended_well(box(DEVICES)).split()) <= set(harmless.split())


STANDING = """
import os
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
print(status["NoNewPrivs"], int(status["CapEff"], 16), int(status["CapPrm"], 16), status["Seccomp"], os.getpid())
print(*sorted({line.split()[1] for line in open("/proc/mounts") if "nosuid" not in line}))
print(*sorted(os.listdir("/proc/self/fd")))
try:
    open("/proc/sys/kernel/core_pattern", "w")
    print("opened")
except OSError:
    pass
"""


def test_no_setuid_program_no_capability_and_no_open_file_gives_more_rights(box):
    rights, suid, files, *more = ended_well(box(STANDING)).splitlines()
    assert rights == "1 0 0 2 1"
    assert suid == ""
    assert files == "0 1 2 3", "3 is the folder that is listed"
    assert more == []


def test_a_flood_of_output_is_cut_off_and_its_program_is_ended(box):
    ran = box("while True: print('y' * 10_000)", timeout=60.0)
    assert (ran.truncated, ran.timed_out, ran.code) == (True, False, 137)
    assert len(ran.stdout) == 256 << 10


def test_input_that_nobody_reads_holds_nothing_up(box):
    assert ended_well(box("print('end')", stdin=b"x" * (10 << 20))) == "end\n"


GROW = """
import os
for path in ("/proc/self/fd/0", "/dev/stdin"):
    try:
        os.write(os.open(path, os.O_RDWR), b"x")
    except OSError:
        print("no")
"""


def test_the_input_is_no_memory_to_write_to(box):
    assert ended_well(box(GROW, stdin="abc")) == "no\nno\n"


def test_a_program_that_closes_its_output_ends_at_its_deadline(box):
    ran = box("import os, time; os.close(1); os.close(2); time.sleep(60)", timeout=0.3)
    assert (ran.timed_out, ran.code) == (True, 137)


def test_a_program_that_ignores_signals_ends_at_its_deadline(box):
    ran = box("import signal\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\nwhile True: pass", timeout=0.3)
    assert (ran.timed_out, ran.code) == (True, 137)


# -- files -------------------------------------------------------------------------------------------------------------

LEFT = """
import os, sys
os.symlink(sys.argv[1], "link")
os.symlink("/", "folder")
open("own", "w").write("mine")
os.makedirs("a/b")
open("a/b/c", "w").write("deep")
os.mkfifo("pipe")
"""


def test_reading_follows_no_link_out_of_the_box(secret):
    if why := missing():
        pytest.skip(why)
    sandbox = Bubblewrap(keep=True)
    ended_well(sandbox.run([*PYTHON, LEFT, str(secret)]))
    assert sandbox.files == {"own": b"mine", "a/b/c": b"deep"}


@pytest.mark.parametrize(
    ("forgery", "said"),
    [
        (b"12 5 ../../passwdevil!", "must be a relative path"),
        (b"11 5 /etc/passwdevil!", "must be a relative path"),
        (b"1 99999999999999999 xy", "cannot be read"),
        (b"-5 5 abcdef", "cannot be read"),
        (b"no numbers at all", "cannot be read"),
        (b"1 1 ab1 1 a", "cannot be read"),
        (b"1 1 ab3 1 a/bc", "both a file and a folder"),
        (b"300 0 " + b"x" * 300, "must be a relative path"),
    ],
)
def test_a_list_of_files_that_a_program_wrote_itself_can_hold_files_only(forgery, said):
    """As a driver's own user a program can write it: the pipe belongs to that user."""
    with pytest.raises(ToolError, match=said):
        Bubblewrap().placed(listed(forgery))
