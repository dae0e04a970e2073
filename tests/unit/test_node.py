"""One node of a cluster: a block of ports that nobody else has, a token that nobody else reads, its own processes."""

import os
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray._private.parameter import RayParams

from rl.protocols import UpdateFailed
from rl.weights import TensorMeta
from rollout.weights import vllm_sender
from trainer.cluster.actors import LearnerActor
from trainer.node import network, ports, processes
from trainer.node.attach import attach, chosen
from trainer.node.node import Node, start
from trainer.node.token import read_token, with_token, write_token


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Where clusters have their folders, and ports that no test beside this one uses."""
    monkeypatch.setattr(ports, "FOLDERS", tmp_path)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def cluster(folders: Path, base: int, head: str = "10.0.0.1:10000") -> Node:
    folder = folders / f"{ports.NAME}{base}"
    folder.mkdir()
    for name, text in {
        "id": f"{base}",
        "owner": str(os.getpid()),
        "address": head,
        "token": "secret",
        "job": "",
    }.items():
        (folder / name).write_text(text)
    return Node(folder)


def test_two_clusters_of_a_node_share_no_port(folders):
    taken = [ports.claim(None) for _ in range(3)]
    bases = sorted(Node(folder).base for folder in taken)
    assert all(b - a >= ports.SPAN for a, b in pairwise(bases))
    for base in bases:
        used = [int(option.partition("=")[2]) for option in ports.ray_ports(base, head=True)]
        assert len(used) == len(set(used)), used
        assert base <= min(used) <= max(used) < base + ports.OURS[0] < base + ports.SPAN


@pytest.mark.parametrize("head", [True, False])
def test_ray_takes_the_ports_of_every_block(tmp_path, monkeypatch, head):
    monkeypatch.setattr(ports, "RANGE", tmp_path / "range")
    bases = set()
    for floor in (9000, 32768):
        (tmp_path / "range").write_text(f"{floor}\t60999\n")
        bases.update(ports.blocks())
    for base in bases:
        given = dict(option[2:].replace("-", "_").split("=") for option in ports.ray_ports(base, head=head))
        # As `ray start` does it.
        given = {"ray_client_server_port": 10001} | {name: int(port) for name, port in given.items()}
        given["metrics_agent_port"], given["gcs_server_port"] = (
            given.pop("dashboard_agent_grpc_port"),
            given.pop("port", None),
        )
        RayParams(**given).update_pre_selected_port()


def test_all_ports_are_below_the_ephemeral_ones(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(ports, "RANGE", tmp_path / "range")
    for floor in (9000, 32768):
        (tmp_path / "range").write_text(f"{floor}\t60999\n")
        assert max(ports.blocks()) + ports.SPAN <= floor
        assert min(ports.blocks()) >= 1024
    (tmp_path / "range").write_text("1024\t60999\n")
    with pytest.raises(ValueError, match="ephemeral ports begin at 1024"):
        ports.blocks()


def test_two_jobs_begin_at_different_blocks(folders, monkeypatch):
    firsts = []
    for job in ("7", "8"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        firsts.append(ports.blocks()[0])
    assert firsts[0] != firsts[1]


def test_a_block_in_which_a_port_is_taken_is_left_out(folders):
    first = Node(ports.claim(None)).base
    ports.claim(None)
    with socket.create_server(("", first + 2 * ports.SPAN + 3)):
        assert Node(ports.claim(None)).base not in (first, first + ports.SPAN, first + 2 * ports.SPAN)
        with pytest.raises(ValueError, match="in use on this node"):
            ports.claim(first + 2 * ports.SPAN)


def test_the_folder_of_a_dead_cluster_is_used_again(folders, monkeypatch):
    # About folders alone: another cluster of this machine may have these ports.
    monkeypatch.setattr(ports, "_is_free", lambda port: True)
    node = cluster(folders, 10_000)
    with pytest.raises(ValueError, match="in use on this node"):
        ports.claim(10_000)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (node.folder / "owner").write_text(str(dead.pid))
    assert ports.claim(10_000) == node.folder
    assert not list(node.folder.iterdir())


def test_a_learner_meets_its_ranks_inside_the_block(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv(ports.PORTS, f"{port}-{port}")
        with pytest.raises(OSError, match=f"no port of {port}-{port} is free"):
            ports.listener()
        monkeypatch.setenv(ports.PORTS, f"{port}-{port + 20}")
        with ports.listener() as found:
            assert port < found.getsockname()[1] <= port + 20
    monkeypatch.delenv(ports.PORTS)
    with ports.listener() as found:
        assert found.getsockname()[1]


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_engines_meet_the_learner_inside_the_block_too(backend, monkeypatch):
    told = []

    def nobody(*_):
        raise UpdateFailed("no engine is here")

    class Client:
        def init_weight_transfer_engine(self, info):
            told.append(info["master_port"])
            nobody()

    class Weights:
        def metadata(self):
            return [TensorMeta(name="w", dtype="float32", shape=(2,))]

        def __iter__(self):
            return iter(())

    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: None)  # there is none
    monkeypatch.setattr(vllm_sender, "join", nobody)  # a thread would wait for the engine
    rank = LearnerActor()
    rank.object = SimpleNamespace(weights=Weights(), rank=0)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv(ports.PORTS, f"{port}-{port + 20}")
        channel = {"address": "127.0.0.1", "world_size": 2, "timeout_s": 1.0, "expected": {"w"}}
        with pytest.raises(UpdateFailed, match="no engine is here"):
            rank.connect(Client(), {"backend": backend, **channel})
    assert port < told[0] <= port + 20


def test_a_token_is_read_by_nobody_else(tmp_path, monkeypatch):
    old = os.umask(0)
    try:
        write_token(tmp_path / "token", None)
    finally:
        os.umask(old)
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    made = (tmp_path / "token").read_text()
    assert read_token(str(tmp_path / "token")) == made
    assert len(made) == 64
    (tmp_path / "token").chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        read_token(str(tmp_path / "token"))
    monkeypatch.setenv("UNISON_CLUSTER_TOKEN", "given")
    assert read_token(None) == "given"


def test_a_stale_token_at_home_or_in_the_environment_counts_nothing(tmp_path):
    stale = {"RAY_AUTH_TOKEN": "stale", "RAY_AUTH_MODE": "disabled", "UNISON_CLUSTER_TOKEN": "own", "HOME": "/h"}
    now = with_token(stale, tmp_path / "token")
    assert now == {"HOME": "/h", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}


def test_only_processes_of_a_cluster_end_with_it(folders):
    mine, other = cluster(folders, 10_000), cluster(folders, 10_400)
    sleep = [sys.executable, "-c", "import signal; print(flush=True); signal.pause()"]
    started = []
    for node in (mine, other):
        mark = {processes.MARK: processes.mark_of(node.folder)}
        started.append(subprocess.Popen(sleep, env=os.environ | mark, stdout=subprocess.PIPE))
        started[-1].stdout.readline()
    try:
        assert mine.end() == 1
        started[0].wait(30)
        assert started[1].poll() is None
        assert not mine.folder.exists()
        assert other.folder.exists()
    finally:
        started[1].kill()


def test_a_driver_finds_the_token_of_the_cluster_that_it_names(folders, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert attach() is None, "without a cluster of ours, auto is Ray's own"
    node = cluster(folders, 10_000)
    assert attach() == node.token
    assert os.environ["RAY_ADDRESS"] == node.head
    monkeypatch.setenv("RAY_ADDRESS", "10.9.9.9:1")
    assert attach() is None
    cluster(folders, 10_400, "10.0.0.2:10400")
    with pytest.raises(ValueError, match=r"several clusters: name one of --port-base 10000 .*--port-base 10400"):
        chosen(None)
    assert chosen(10_400).head == "10.0.0.2:10400"
    with pytest.raises(ValueError, match="no such cluster: there is --port-base 10000"):
        chosen(12_345)


def test_a_job_means_the_cluster_of_its_own_attempt(folders, monkeypatch):
    """SLURM may end the first attempt before it has removed its folder."""
    for base, attempt in ((10_000, "7.0"), (10_400, "7.1"), (10_800, "8.0")):
        (cluster(folders, base).folder / "job").write_text(attempt)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert chosen(None).base == 10_000
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert chosen(None).base == 10_400
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (folders / f"{ports.NAME}10400" / "owner").write_text(str(dead.pid))
    with pytest.raises(ValueError, match="no such cluster"):
        chosen(None)


def test_an_interface_is_named_or_refused_with_those_that_exist():
    assert network.interface("127.0.0.1") == network.interface("lo") == ("lo", "127.0.0.1")
    assert network.interface(None, "127.0.0.1") == ("lo", "127.0.0.1")
    with pytest.raises(ValueError, match=r"--interface eth77: .* It has .*lo \(127.0.0.1\)"):
        network.interface("eth77")


def test_a_head_that_does_not_answer_is_named_and_nothing_is_left(folders):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    with pytest.raises(ValueError, match=f"nothing answers at 127.0.0.1:{free}"):
        start(f"127.0.0.1:{free}", token="t", interface=None, base=None, options=[], check=lambda *_: None)
    assert not list(folders.iterdir())


def test_a_wrong_token_starts_nothing_and_leaves_nothing(folders):
    def refuse(head: str, token: Path) -> None:
        raise ValueError(f"the head at {head} refuses {token.read_text()}")

    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"the head at {address} refuses wrong"):
            start(address, token="wrong", interface=None, base=None, options=[], check=refuse)
    assert not list(folders.iterdir())
