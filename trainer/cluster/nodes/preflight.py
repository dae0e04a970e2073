"""What does each node of a cluster have? Asked before any actor of a run starts."""

import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rl import checkout
from trainer import machine
from trainer.cluster.nodes.code import on_this_node, pinned
from trainer.cluster.nodes.folder import answer_word, judge, write_word
from trainer.cluster.ray_session import join_ray
from trainer.node.ports import listener

GIB = 2**30
LEAST_SHARED = 1.0
"""GiB of shared memory below which NCCL and vLLM fail."""
SENT = 64 << 20
"""Bytes that measure a link."""
SECONDS = 1800.0
"""Within which a node must answer: it may have to fetch the model."""


@dataclass
class NodeFacts:
    """One node."""

    host: str
    address: str
    gpus: float
    digest: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    disk: float = 0.0
    """GiB that are free where the runs are."""
    shared: float = 0.0
    """GiB that are free in /dev/shm."""
    wrong: list[str] = field(default_factory=list)
    link: float = 0.0
    """MB/s to the next node; 0 where there is none."""


class Probe:
    """A process on one node."""

    def look(
        self, folder: str, index: int, model: str, revision: str, versions: Callable[[], dict[str, str]]
    ) -> tuple[NodeFacts, tuple[str, str, str]]:
        """What it has, and what it reads in the folder of the runs."""
        found = NodeFacts(socket.gethostname(), ray.util.get_node_ip_address(), 0.0)
        found.digest, found.versions = checkout.digest(), versions()
        found.shared = machine.shared_memory() / GIB
        if os.path.isdir(folder):
            found.disk = shutil.disk_usage(folder).free / GIB
        try:
            on_this_node(model, revision)
        except (ValueError, OSError) as error:
            found.wrong.append(str(error))
        return found, answer_word(folder, index)

    def listen(self) -> tuple[str, int]:
        """Where it receives."""
        self.socket = listener(ray.util.get_node_ip_address())
        return ray.util.get_node_ip_address(), self.socket.getsockname()[1]

    def receive(self) -> None:
        """Take what one sender sends."""
        self.socket.settimeout(30)
        connection, _ = self.socket.accept()
        with connection, self.socket:
            left = SENT
            while left > 0 and (data := connection.recv(1 << 20)):
                left -= len(data)
            connection.sendall(b"!")

    def send(self, address: str, port: int) -> float:
        """MB/s to another node; 0 where it is not reached."""
        try:
            with socket.create_connection((address, port), timeout=30) as connection:
                began, block = time.perf_counter(), bytes(1 << 20)
                for _ in range(SENT >> 20):
                    connection.sendall(block)
                connection.recv(1)
        except OSError:
            return 0.0
        return SENT / 1e6 / (time.perf_counter() - began)


def examine(folder: Path, model: str, disk_gib: float, versions: Callable[[], dict[str, str]]) -> list[NodeFacts]:
    """Facts of all nodes, the driver's first; `wrong` has what would end a run. `disk_gib` are its checkpoints."""
    join_ray()
    here = ray.get_runtime_context().get_node_id()
    nodes = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda n: (n["NodeID"] != here, n["NodeManagerAddress"]))
    kind: Any = ray.remote(max_concurrency=2)(Probe)  # pyright: ignore[reportCallIssue]
    env = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(checkout.ROOT)])}}
    probes = [
        kind.options(
            num_cpus=0, runtime_env=env, scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)
        ).remote()
        for n in nodes
    ]
    folder.mkdir(parents=True, exist_ok=True)
    word, (path, revision) = write_word(folder), pinned(model)
    asked = [probe.look.remote(str(folder.resolve()), i, path, revision, versions) for i, probe in enumerate(probes)]
    answers = ray.get(asked, timeout=SECONDS)
    found = [facts for facts, _ in answers]
    for facts, node, text in zip(found, nodes, judge(folder.resolve(), word, [a for _, a in answers]), strict=True):
        facts.gpus = node["Resources"].get("GPU", 0.0)
        facts.wrong += [text] if text else []
    for i, probe in enumerate(probes if len(probes) > 1 else []):
        other = probes[(i + 1) % len(probes)]
        address, port = ray.get(other.listen.remote(), timeout=60)
        other.receive.remote()
        found[i].link = ray.get(probe.send.remote(address, port), timeout=120)
        if not found[i].link:
            found[i].wrong.append(f"does not reach {address}: a firewall, or another --interface")
    for probe in probes:
        ray.kill(probe)
    compare(found, disk_gib)
    return found


def compare(found: Sequence[NodeFacts], disk_gib: float) -> None:
    """Add to `wrong` what differs from the driver's node, and what is too small."""
    first = found[0]
    for facts in found:
        if facts.digest != first.digest:
            facts.wrong.append("has other sources of unison-rl than the driver's node: put the same checkout there")
        for name in sorted(first.versions.keys() | facts.versions.keys()):
            own, wanted = facts.versions.get(name, "none"), first.versions.get(name, "none")
            if own != wanted:
                facts.wrong.append(f"has {name} {own}, and the driver's node {wanted}: set it up as that one")
        if facts.shared < LEAST_SHARED:
            facts.wrong.append(f"has {facts.shared:.2f} GiB of shared memory, and needs {LEAST_SHARED:g}: --shm-size")
        if facts.disk < disk_gib:
            facts.wrong.append(f"has {facts.disk:.1f} GiB free for checkpoints, which take {disk_gib:.1f}")
