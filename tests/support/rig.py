"""SLURM's commands on the two nodes of tests/support/slurm_rig.sh."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
NEEDED = ("slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter")
WAIT_S = 600.0
"""No wait is meant to take a tenth of this."""


def lacking() -> str:
    """Why there is no rig here, or ""."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    return f"needs {', '.join(missing)} (apt-get install slurm-wlm munge iproute2)" if missing else ""


class Rig:
    """A running rig."""

    def __init__(self, folder: Path, process: subprocess.Popen) -> None:
        self.folder, self.process = folder, process

    @property
    def inside(self) -> int:
        """The first process inside."""
        return psutil.Process(self.process.pid).children()[0].pid

    def run(self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """A command next to slurmctld; returns what it printed."""
        enter = ["nsenter", "-t", str(self.inside), "-m", "-p", "-u", "-n", "--", "env", "-C", str(cwd or ROOT)]
        done = subprocess.run([*enter, *command], capture_output=True, text=True, env=os.environ | (env or {}))
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout.strip()

    def state(self, job: str) -> dict[str, str]:
        """What scontrol shows of a job."""
        words = self.run("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, what: str, seen: Callable[[], bool], seconds: float = WAIT_S) -> None:
        """Return once it is seen."""
        deadline = time.monotonic() + seconds
        while not seen():
            assert time.monotonic() < deadline, f"no {what} within {seconds:g} s"
            time.sleep(0.2)

    def kill_node(self, name: str) -> None:
        """End all processes of a node at once."""
        outer = int((self.folder / f"{name}.pid").read_text())
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                names = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                pids = next(line.split()[1:] for line in names if line.startswith("NSpid"))
                if len(pids) > 1 and pids[1] == str(outer):
                    os.kill(process.children()[0].pid, signal.SIGKILL)
                    return
        raise AssertionError(f"no node {name}")

    def revive(self, name: str) -> None:
        """Start a node again."""
        (self.folder / f"revive-{name}").touch()


@contextmanager
def rig(folder: Path) -> Iterator[Rig]:
    """Two idle nodes."""
    environment = os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    with (folder / "rig.log").open("w") as log:
        # The environment may be a link of the checkout's to another place.
        seen = map(str, (folder, ROOT, Path(sys.prefix).resolve()))
        command = [str(ROOT / "tests/support/slurm_rig.sh"), *seen]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    one = Rig(folder, process)

    def idle() -> bool:
        assert process.poll() is None, (folder / "rig.log").read_text()
        with suppress(AssertionError, IndexError, psutil.NoSuchProcess):
            return one.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D") == "2"
        return False

    try:
        one.wait("two idle nodes", idle)
        yield one
    finally:
        process.kill()
        process.wait()
