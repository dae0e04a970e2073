"""Two nodes on this machine that share the folders of a test and nothing else, with a cable that may be bad."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
NEEDED = ("ip", "unshare", "nsenter")
SPACES = ["--net", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
READY_S = 60.0


def lacking() -> str:
    """Why there are no nodes here, or ""."""
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        return "needs root and /dev/net/tun"
    missing = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    return f"needs {', '.join(missing)} (apt-get install iproute2)" if missing else ""


class TwoNodes:
    """n1 has the address 10.99.0.1, n2 has 10.99.0.2."""

    def __init__(self, folder: Path, names: dict[str, int]) -> None:
        self.folder, self.names = folder, names

    def enter(self, name: str) -> list[str]:
        """What starts a command on a node."""
        return ["nsenter", "-t", str(self.names[name]), "-m", "-p", "-u", "-n", "--", "env", "-C", str(ROOT)]

    def run(self, name: str, *command: str, text: str = "") -> str:
        """A command on a node; returns what it printed."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        options = {"env": environment, "input": text, "text": True, "capture_output": True}
        done = subprocess.run([*self.enter(name), *command], **options)
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout.strip()

    def cluster(self, name: str, *words: str, text: str = "") -> str:
        """`unison cluster` on a node."""
        return self.run(
            name, sys.executable, "-c", "from trainer.cli import main; main()", "cluster", *words, text=text
        )

    def holds(self, name: str, command: str) -> bool:
        """Whether a node has such a process."""
        with suppress(psutil.NoSuchProcess):
            inside = psutil.Process(self.names[name]).children(recursive=True)
            return any(command in " ".join(process.cmdline()) for process in inside)
        return False

    def carried(self) -> dict[str, int]:
        """Packets and bytes that went over the cable, and packets that it lost, a second ago."""
        return json.loads((self.folder / "carried.json").read_text())


@contextmanager
def two_nodes(
    folder: Path, *, places: tuple[int, int] = (1, 1), delay: float = 0.0, loss: float = 0.0
) -> Iterator[TwoNodes]:
    """Both nodes, with a cluster of `unison cluster` on them, and places for actors on each."""
    started: list[subprocess.Popen] = []
    seen = [str(path) for path in (folder, ROOT, Path(sys.prefix).resolve(), (ROOT / "models").resolve())]

    def first_of(process: subprocess.Popen, name: str) -> int:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            assert process.poll() is None, (folder / f"{name}.log").read_text()
            if inside := psutil.Process(process.pid).children():
                return inside[0].pid
            time.sleep(0.05)
        raise AssertionError(f"{name} did not start")

    def begin(name: str, *command: str) -> subprocess.Popen:
        with (folder / f"{name}.log").open("w") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
        return started[-1]

    try:
        names = {}
        for number in (1, 2):
            name, node = f"n{number}", [str(ROOT / "tests/support/node.sh"), f"n{number}", f"10.99.0.{number}", *seen]
            names[name] = first_of(begin(name, "unshare", *SPACES, *node, "--", "sleep", "infinity"), name)
        nodes = TwoNodes(folder, names)
        cable = [sys.executable, str(ROOT / "tests/support/link.py"), *map(str, names.values())]
        quality = ["--delay", str(delay), "--loss", str(loss), "--counts", str(folder / "carried.json")]
        begin("cable", *cable, *quality)
        for pid in names.values():
            # From outside of its file system, which node.sh is still putting together.
            seen_up = ["nsenter", "-t", str(pid), "-n", "ip", "-4", "addr", "show", "eth0", "up"]
            deadline = time.monotonic() + READY_S
            while "inet" not in subprocess.run(seen_up, text=True, capture_output=True).stdout:
                assert time.monotonic() < deadline, [path.read_text() for path in folder.glob("*.log")]
                time.sleep(0.05)
        nodes.cluster("n1", "head", "--interface", "eth0", "--cpus", str(places[0]), "--gpus", "0")
        home = nodes.cluster("n1", "folder")
        head, token = (nodes.run("n1", "cat", f"{home}/{name}") for name in ("address", "token"))
        words = ["--token-file", "-", "--cpus", str(places[1]), "--gpus", "0"]
        nodes.cluster("n2", "join", head, *words, text=token)
        nodes.cluster("n1", "wait", "n1", "n2")
        yield nodes
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()
