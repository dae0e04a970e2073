"""`unison cluster` between two networks of one machine: joining, refusing, ending its own alone."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

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


@pytest.mark.timeout(4 * 3600)
def test_every_join_succeeds_with_a_stale_token_in_another_home(networks: None, tmp_path: Path) -> None:
    """50 joins: UNISON_JOINS=2 makes two."""
    first = head(tmp_path)
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


OTHER = 65534
"""Another user, who may read what root may: this Python may lie in root's home."""


@pytest.mark.timeout(4 * 3600)
def test_clusters_that_start_at_the_same_time_share_nothing(tmp_path: Path) -> None:
    """20 times two heads of one user and one of another: UNISON_HEADS=2 makes two."""
    python = [sys.executable, "-c", "from trainer.cli import main; main()", "cluster", "head", "--interface", "lo"]
    read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    theirs = ["setpriv", f"--reuid={OTHER}", "--clear-groups", "--bounding-set=-all,+dac_read_search", *read]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for number in range(HEADS):
        before = set(ports.FOLDERS.glob(f"{ports.NAME}*"))
        starts = []
        for user in ([], [], theirs):
            home = tmp_path / f"{number}-{len(starts)}"
            home.mkdir(mode=0o777)
            home.chmod(0o777)
            command, own = [*user, *python, "--cpus", "1", "--gpus", "0"], environment | {"HOME": str(home)}
            starts.append(
                subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        said = [start.communicate()[0].decode() for start in starts]
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
            for node in made:
                assert len(alive_nodes(node.head, node.token)) == 1, "a node joined another one's cluster"
                with pytest.raises(ValueError, match="refuses this token"):
                    alive_nodes(node.head, next(other.token for other in made if other != node))
        finally:
            for node in made:
                node.end()
        print(f"round {number + 1}: {bases}")
