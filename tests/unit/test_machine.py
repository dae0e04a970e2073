"""What may be used of a machine: cores by affinity and quota, memory by the container's limit, shared memory."""

import os

import pytest

from trainer import machine
from trainer.cluster.ray_session import LEAST_STORE, object_store_bytes

MIB = 1 << 20


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """Control groups of our own: the process is in /outer/inner."""
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: type("Free", (), {"available": 2**40}))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))

    def write(own, **files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def test_a_process_counts_the_cores_of_its_affinity(groups, monkeypatch):
    groups("0::/\n")
    assert machine.cores() == 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert machine.cores() == 1


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 16), ("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1)]
)
def test_a_quota_of_any_enclosing_group_counts_rounded_down(groups, quota, cores):
    groups("0::/outer/inner\n", outer__cpu_dot_max=quota + "\n", outer__inner__cpu_dot_max="max 100000\n")
    assert machine.cores() == cores


def test_a_quota_of_version_1_counts_and_minus_one_is_none(groups):
    own = "4:memory:/\n2:cpu,cpuacct:/job\n"
    groups(own, **{"cpu,cpuacct__job__cpu_dot_cfs_quota_us": "300000\n"})
    assert machine.cores() == 16, "a quota without its period"
    groups(own, **{"cpu,cpuacct__job__cpu_dot_cfs_period_us": "100000\n"})
    assert machine.cores() == 3
    groups(own, **{"cpu,cpuacct__job__cpu_dot_cfs_quota_us": "-1\n"})
    assert machine.cores() == 16


def test_a_container_may_have_what_it_only_holds_of_files(groups):
    files = {"max": 8 * 2**30, "current": 7 * 2**30, "stat": f"anon 1\ninactive_file {5 * 2**30}"}
    groups("0::/\n", **{f"memory_dot_{name}": f"{text}\n" for name, text in files.items()})
    assert machine.memory() == 6.0 * 2**30
    groups("0::/\n", memory_dot_max="max\n")
    assert machine.memory() == 2.0**40


def test_the_memory_of_version_1_counts_too(groups):
    files = {
        "limit_in_bytes": 4 * 2**30,
        "usage_in_bytes": 3 * 2**30,
        "stat": f"inactive_file 7\ntotal_inactive_file {2**30}",
    }
    groups("9:memory:/a/b\n", **{f"memory__a__memory_dot_{name}": f"{text}\n" for name, text in files.items()})
    assert machine.memory() == 2.0 * 2**30


def test_this_machine_answers():
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)
    assert machine.memory() > 2**20
    assert machine.shared_memory() >= 0


def test_rays_store_leaves_half_of_shared_memory_to_the_weights(monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: 100.0 * 2**30)
    assert object_store_bytes(64 * MIB) is None, "Ray keeps its objects in files"
    assert object_store_bytes(2 * LEAST_STORE) == LEAST_STORE
    assert object_store_bytes(2**40) == 30 * 2**30
    monkeypatch.setattr(machine, "SHARED", machine.Path("/no/such/folder"))
    assert machine.shared_memory() == 0
