"""`unison cluster` between two networks of one machine: joining, refusing, ending its own alone."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from rig import lacking
from trainer.cluster.nodes.gcs import alive_nodes
from trainer.node import ports
from trainer.node.node import Node
from trainer.node.processes import processes

pytestmark = [pytest.mark.skipif(bool(lacking()), reason=lacking()), pytest.mark.nightly, pytest.mark.serial]
JOINS, HEADS = (int(os.environ.get(f"UNISON_{name}", n)) for name, n in (("JOINS", "50"), ("HEADS", "20")))
NAMES = ("unison-a", "unison-b")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def networks() -> Iterator[None]:
    """Two networks with 10.98.0.1 and 10.98.0.2, and a cable between them."""
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        ip("netns", "add", name)
    ip("link", "add", "eth0", "netns", NAMES[0], "type", "veth", "peer", "name", "eth0", "netns", NAMES[1])
    for i, name in enumerate(NAMES, 1):
        for words in (["addr", "add", f"10.98.0.{i}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            ip("-n", name, *words)
        ip("-n", name, "link", "set", "lo", "up")
    yield
    for folder in list(ports.mine()):
        if Node(folder).head.startswith("10.98.0."):
            Node(folder).end()
    for name in NAMES:
        ip("netns", "del", name)


def cluster(network: str, home: Path, *words: str, token: str = "") -> subprocess.CompletedProcess[str]:
    """`unison cluster` in a network, with a home of its own."""
    (home / ".ray").mkdir(parents=True, exist_ok=True)
    (home / ".ray" / "auth_token").write_text("stale")
    python = [sys.executable, "-c", "from trainer.cli import main; main()"]
    command = ["ip", "netns", "exec", network, *python, "cluster", *words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(command, env=environment | {"HOME": str(home)}, input=token, text=True, capture_output=True)


def head(tmp_path: Path) -> Node:
    done = cluster(NAMES[0], tmp_path / "home", "head", "--interface", "eth0", "--cpus", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    return next(node for node in map(Node, ports.mine()) if node.head.startswith("10.98.0.1"))


OTHER = 65534
"""Another user, who may read what root may: this Python may lie in root's home."""


def as_the_other(home: Path) -> list[str]:
    """What starts a command of theirs, with a home that they may write to."""
    home.mkdir(mode=0o777)
    home.chmod(0o777)
    read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    user = ["setpriv", f"--reuid={OTHER}", "--clear-groups", "--bounding-set=-all,+dac_read_search", *read]
    return [*user, "env", f"HOME={home}", f"TMPDIR={home}"]


@contextmanager
def their_ray(network: str, home: Path) -> Iterator[list[psutil.Process]]:
    """A Ray that another user started as Ray's own pages say: its default ports, no token, in /tmp/ray of theirs."""
    ray, mark = str(Path(sys.executable).with_name("ray")), f"UNISON_TEST_OTHER={home}"
    # The path of a socket has at most 107 bytes.
    place = Path(tempfile.mkdtemp(prefix="their-ray-", dir="/tmp"))
    place.chmod(0o777)
    start = [ray, "start", "--head", "--num-cpus=1", f"--temp-dir={place}", "--disable-usage-stats"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"UNISON_TEST_OTHER": str(home)}
    command = ["ip", "netns", "exec", network, *as_the_other(home), *start, "--node-ip-address=10.98.0.2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)

    def theirs() -> list[psutil.Process]:
        found = []
        for pid in psutil.pids():
            with suppress(OSError, psutil.NoSuchProcess):
                if mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    found.append(psutil.Process(pid))
        return found

    try:
        assert done.returncode == 0, done.stdout + done.stderr
        names = {process.name() for process in theirs()}
        assert {"raylet", "gcs_server"} <= names, names
        yield theirs()
    finally:
        for process in theirs():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(place)


@pytest.mark.timeout(4 * 3600)
def test_every_join_succeeds_with_a_stale_token_in_another_home(networks: None, tmp_path: Path) -> None:
    """50 joins, on a node on which another user's Ray runs: UNISON_JOINS=2 makes two."""
    first = head(tmp_path)
    with their_ray(NAMES[1], tmp_path / "theirs") as theirs:
        joins(first, tmp_path)
        assert all(process.is_running() for process in theirs if process.name() in ("raylet", "gcs_server"))


def joins(first: Node, tmp_path: Path) -> None:
    """Join, be seen, and leave, again and again."""
    token = first.token.read_text()
    for number in range(JOINS):
        home = tmp_path / f"home-{number}"
        done = cluster(NAMES[1], home, "join", first.head, "--token-file", "-", "--cpus", "1", token=token)
        assert done.returncode == 0, f"join {number}: {done.stdout}{done.stderr}"
        assert token not in done.stdout + done.stderr
        waited = cluster(NAMES[0], home, "wait", "2", "--port-base", str(first.base))
        assert waited.returncode == 0, waited.stdout + waited.stderr
        own = [node for node in map(Node, ports.mine()) if node.head == first.head and node.base != first.base]
        assert len(own) == 1
        assert own[0].end()
        assert list(processes(first.folder)), "stopping one node ended the other"
        print(f"join {number + 1} of {JOINS}")
    commands = [process.cmdline() for process in processes(first.folder)]
    assert not any(token in word for command in commands for word in command)


def test_a_wrong_token_is_named_at_once(networks: None, tmp_path: Path) -> None:
    first = head(tmp_path)
    began = time.monotonic()
    done = cluster(NAMES[1], tmp_path / "h", "join", first.head, "--token-file", "-", token="0" * 64)
    assert done.returncode == 2
    assert f"the head at {first.head} refuses this token" in done.stdout + done.stderr
    seconds = time.monotonic() - began
    print(f"named after {seconds:.1f} s, with the imports")
    assert seconds < 10
    assert [Node(folder).base for folder in ports.mine() if Node(folder).head == first.head] == [first.base]


def listened(node: Node) -> set[int]:
    """The ports on which a cluster's processes listen."""
    found = set()
    for process in processes(node.folder):
        with suppress(psutil.NoSuchProcess):
            found |= {each.laddr.port for each in process.net_connections() if each.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.timeout(4 * 3600)
def test_clusters_that_start_at_the_same_time_share_nothing(tmp_path: Path) -> None:
    """20 times two heads of one user and one of another: UNISON_HEADS=2 makes two."""
    python = [sys.executable, "-c", "from trainer.cli import main; main()", "cluster", "head", "--interface", "lo"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for number in range(HEADS):
        before = set(ports.FOLDERS.glob(f"{ports.NAME}*"))
        starts = []
        homes = [tmp_path / f"{number}-{user}" for user in ("one", "one-again", "other")]
        for user in (["env", f"HOME={homes[0]}"], ["env", f"HOME={homes[1]}"], as_the_other(homes[2])):
            command, pipe = [*user, *python, "--cpus", "1", "--gpus", "0"], subprocess.PIPE
            starts.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True))
        said = [start.communicate()[0] for start in starts]
        made = [Node(folder) for folder in sorted(set(ports.FOLDERS.glob(f"{ports.NAME}*")) - before)]
        try:
            assert [start.returncode for start in starts] == [0, 0, 0], f"round {number}: {said}"
            assert len(made) == 3
            bases = sorted(node.base for node in made)
            assert all(b - a >= ports.SPAN for a, b in pairwise(bases)), bases
            assert sorted(node.folder.stat().st_uid for node in made) == [os.getuid(), os.getuid(), OTHER]
            assert len({node.token.read_text() for node in made}) == 3
            used = [{process.pid for process in processes(node.folder)} for node in made]
            assert all(used)
            assert not used[0] & used[1] | used[0] & used[2] | used[1] & used[2]
            # Ray's servers may listen where another one does (SO_REUSEPORT), and then share its connections.
            heard = [listened(node) for node in made]
            assert all(node.base in own for node, own in zip(made, heard, strict=True))
            assert not heard[0] & heard[1] | heard[0] & heard[2] | heard[1] & heard[2]
            for node in made:
                assert len(alive_nodes(node.head, node.token)) == 1, "a node joined another one's cluster"
                with pytest.raises(ValueError, match="refuses this token"):
                    alive_nodes(node.head, next(other.token for other in made if other != node))
        finally:
            for node in made:
                node.end()
        print(f"round {number + 1}: {bases}")
