"""What does this machine give us? Cores, memory and shared memory: what we may use of it, not what it has."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.request import getproxies, proxy_bypass

import psutil

SHARED = Path("/dev/shm")
GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def cores() -> int:
    """Cores that this process may use: those of its affinity, and no more than the quota of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Rounded down: of two threads on one and a half cores, the one would always wait for the other.
    return max(1, int(min(allowed, _quota())))


def memory() -> float:
    """Bytes that may still be allocated here, and in this process's container."""
    return min(float(psutil.virtual_memory().available), _room())


def shared_memory() -> int:
    """Bytes that are free in /dev/shm; 0 where there is none."""
    try:
        free = os.statvfs(SHARED)
    except OSError:
        return 0
    return free.f_bavail * free.f_frsize if os.access(SHARED, os.W_OK) else 0


def _quota() -> float:
    """Cores' worth of time that the container's quota leaves; infinite without one."""
    quotas = [math.inf]
    for folder in _folders("cpu"):
        if both := _words(folder / "cpu.max"):
            quotas.append(math.inf if both[0] == "max" else int(both[0]) / int(both[1]))
        quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
        if quota and period and int(quota[0]) > 0:
            quotas.append(int(quota[0]) / int(period[0]))
    return min(quotas)


def _room() -> float:
    """Bytes that the container may still allocate; infinite without a limit."""
    rooms = [math.inf]
    names = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for folder in _folders("memory"):
        for limit, used, reclaimable in names:
            most, now = _words(folder / limit), _words(folder / used)
            if not most or not now or most[0] == "max":
                continue
            # Pages read from files count as used, although the kernel may free them at any moment.
            stat = _words(folder / "memory.stat")
            free = int(stat[stat.index(reclaimable) + 1]) if reclaimable in stat else 0
            rooms.append(int(most[0]) - int(now[0]) + free)
    return min(rooms)


def _folders(controller: str) -> Iterator[Path]:
    """The control groups that limit this process, its own and those above it (version 2, and version 1)."""
    for line in _text(OWN_GROUP).splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = GROUPS / controllers if controllers else GROUPS
        path = root / own.lstrip("/")
        # In a container the path may be the host's, and only the root is seen.
        yield from [folder for folder in (path, *path.parents) if folder == root or root in folder.parents]


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def check_proxy(host: str) -> None:
    """Raise ValueError where the clients of agents would ask a proxy for the engines of this machine."""
    if "http" in getproxies() and not proxy_bypass(host):
        raise ValueError(
            f"HTTP_PROXY is set, so an agent's client would ask the proxy for the engines at {host}: set "
            f"NO_PROXY={host} too"
        )
