"""How much memory do all processes of a command hold together, and which ones at the peak?

python scripts/bench/peak_memory.py --json peak.json -- python recipes/quickstart.py --seed 0

Every process that the command starts is found by a mark in its environment, Ray's daemons too, which leave the
process group. Anonymous and shared memory is each process's proportional share (PSS), so a shared page counts once.
A page of a file (libraries, the model) counts once for the run: of each file, what the process with most of it holds.
PSS would not do there, because other programs on the machine that use the same library would take a share away.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any

GIB = 2**30
MARK = "UNISON_MEMORY_MARK"
KINDS = {
    "learner rank": r"^ray::LearnerActor",
    "engine's actor": r"^ray::EngineActor",
    "engine core": r"^VLLM::|multiprocessing\.",
    "Ray, gcs": r"gcs_server",
    "Ray, raylet": r"raylet/raylet",
    "Ray, idle worker": r"^ray::IDLE|default_worker",
    "Ray, agents and monitors": r"^ray::\w+Agent|/ray/|ray-dashboard",
    "W&B": r"wandb|gpu_stats",
}
"""Kind of a process by what its command line holds; the first that fits. None fits: the driver."""
FILES_EVERY = 40
"""Samples between looks at every mapping, which take most of a second; these pages hardly change."""


def main(command: list[str], seconds: float, report: Path | None) -> int:
    """Run the command to its end, print the peak by kind of process, and return the command's exit code."""
    mark = uuid.uuid4().hex
    began = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {MARK: mark})
    peak, files, known, samples = Peak(), 0, {}, 0
    while process.poll() is None:
        pids = marked(mark, known)
        if samples % FILES_EVERY == 0:
            files = max(files, file_bytes(pids))
        peak.add(time.perf_counter() - began, pids)
        samples += 1
        time.sleep(seconds)
    found = peak.report() | {"files_gib": round(files / GIB, 3)}
    found["peak_gib"] = round(found["anonymous_and_shared_gib"] + files / GIB, 3)
    found |= {"seconds": round(time.perf_counter() - began), "samples": samples, "exit_code": process.returncode}
    show(found)
    if report:
        report.write_text(json.dumps(found, indent=1) + "\n")
    return process.returncode


class Peak:
    """The greatest sum so far, and each kind of process's own greatest."""

    def __init__(self) -> None:
        self.total, self.at, self.parts = 0, 0.0, {}
        self.own: dict[str, int] = defaultdict(int)
        self.count: dict[str, int] = {}
        self.cpu: dict[tuple[str, int], float] = {}

    def add(self, at: float, pids: dict[int, str]) -> None:
        """Sample all processes once."""
        parts, count, shared = defaultdict(int), defaultdict(int), 0
        for pid, kind in pids.items():
            anonymous, mapped = share_of(pid)
            parts[kind] += anonymous + mapped
            shared += mapped
            count[kind] += 1
            self.cpu[kind, pid] = max(self.cpu.get((kind, pid), 0.0), cpu_seconds(pid))
        if (unmapped := shared_files(pids) - shared) > 0:
            parts["shared memory, not mapped"] = unmapped
        for kind, n in parts.items():
            self.own[kind] = max(self.own[kind], n)
        if sum(parts.values()) > self.total:
            self.total, self.at, self.parts, self.count = sum(parts.values()), at, dict(parts), dict(count)

    def report(self) -> dict[str, Any]:
        """GiB, and when."""
        cpu: dict[str, int] = defaultdict(int)
        for (kind, _), seconds in self.cpu.items():
            cpu[kind] += round(seconds)
        return {
            "anonymous_and_shared_gib": round(self.total / GIB, 3),
            "at_seconds": round(self.at, 1),
            "at_peak_gib": {k: round(n / GIB, 3) for k, n in sorted(self.parts.items(), key=lambda p: -p[1])},
            "processes_at_peak": self.count,
            "own_peak_gib": {k: round(n / GIB, 3) for k, n in sorted(self.own.items(), key=lambda p: -p[1])},
            "cpu_seconds": {k: n for k, n in cpu.items() if n},
        }


def marked(mark: str, known: dict[int, bool]) -> dict[int, str]:
    """Kind of every living process whose environment holds the mark, by pid. `known` keeps what was looked up."""
    pids = [int(p) for p in os.listdir("/proc") if p.isdigit()]
    for pid in pids:
        if pid not in known:
            known[pid] = f"{MARK}={mark}" in read(f"/proc/{pid}/environ")
    # One that has ended and waits for its parent has no command line, and holds nothing.
    return {pid: kind_of(pid) for pid in pids if known[pid] and read(f"/proc/{pid}/cmdline")}


def kind_of(pid: int) -> str:
    """By its command line, with the title that Ray and vLLM give a process."""
    line = read(f"/proc/{pid}/cmdline").replace("\0", " ")
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, line)), "driver")


def share_of(pid: int) -> tuple[int, int]:
    """Bytes of a process's share of anonymous and of shared memory."""
    rollup = read(f"/proc/{pid}/smaps_rollup")
    found = (re.search(rf"^Pss_{kind}: +(\d+)", rollup, re.M) for kind in ("Anon", "Shmem"))
    anonymous, mapped = (1024 * int(match[1]) if match else 0 for match in found)
    return anonymous, mapped


def cpu_seconds(pid: int) -> float:
    """Time on a core so far: on a machine that others use, it compares two runs better than the clock does."""
    fields = read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return sum(int(n) for n in fields[11:13]) / os.sysconf("SC_CLK_TCK")


def shared_files(pids: dict[int, str]) -> int:
    """Bytes that the run's files in /dev/shm hold, mapped by a process at this moment or not."""
    paths = set()
    for pid in pids:
        try:
            paths |= {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        except OSError:
            continue
    return sum(os.stat(p).st_blocks * 512 for p in paths if p.startswith("/dev/shm/") and os.path.exists(p))


def file_bytes(pids: dict[int, str]) -> int:
    """Pages of files in memory: of each file, what the process with most of it maps."""
    most: dict[str, int] = defaultdict(int)
    for pid in pids:
        own: dict[str, int] = defaultdict(int)
        path = ""
        for line in read(f"/proc/{pid}/smaps").splitlines():
            if header := re.match(r"[\da-f]+-[\da-f]+ \S+ \S+ \S+ (\d+) +(.*)", line):
                path = header[2] if header[1] != "0" and not re.match(r"/dev/|/memfd:|/SYSV", header[2]) else ""
            elif path and line.startswith("Rss:"):
                own[path] += 1024 * int(line.split()[1])
            elif path and line.startswith("Anonymous:"):
                own[path] -= 1024 * int(line.split()[1])
        for path, n in own.items():
            most[path] = max(most[path], n)
    return sum(most.values())


def read(path: str) -> str:
    """What a file of /proc holds; nothing where the process has ended or belongs to another user."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def show(found: dict[str, Any]) -> None:
    """The peak, its parts, and what each kind held when it held most."""
    print(f"\npeak of all processes: {found['peak_gib']:.2f} GiB", end="")
    own = found["anonymous_and_shared_gib"]
    print(f" ({own:.2f} of their own at {found['at_seconds']:.0f} s, {found['files_gib']:.2f} of files)")
    for kind, gib in found["own_peak_gib"].items():
        count = found["processes_at_peak"].get(kind, 0)
        print(f"  {kind:<28}{found['at_peak_gib'].get(kind, 0):7.2f} at the peak ({count}), {gib:.2f} at most")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="between samples")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    words = [w for w in arguments.command if w != "--"] or parser.error("give a command")
    sys.exit(main(words, arguments.seconds, arguments.json))
