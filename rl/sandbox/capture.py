"""What does a program write until it ends? Its output up to a cap; at a limit, its whole group is killed."""

import fcntl
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.environments.types import EnvError
from rl.sandbox.types import Ran

TICK_S = 0.05
"""Seconds between two looks at the memory of a program."""
Command = Callable[[list[int], list[int]], list[str]]
"""Makes the command, given the file descriptors that it can read and those that it can write."""


@dataclass(kw_only=True)
class Output:
    """What came of a command."""

    outlets: list[bytearray]
    """What it wrote to standard output, to standard error, and to the descriptors that it was given."""
    code: int = 0
    """Its exit status, as a shell has it."""
    ended: str = ""
    """The limit that ended it: "time", "output" or "memory"; empty: none."""

    def ran(self, code: int, note: str = "") -> Ran:
        """What a sandbox returns of it."""
        out, err = (outlet.decode(errors="replace") for outlet in self.outlets[:2])
        late, cut = self.ended == "time", self.ended == "output"
        return Ran(stdout=out, stderr=err + note, code=137 if self.ended else code, timed_out=late, truncated=cut)


def capture(
    command: Command,
    inlets: Sequence[bytes],
    most: Sequence[int],
    seconds: float,
    memory: int | None = None,
    **popen: Any,
) -> Output:
    """Run a command. `inlets[0]` is its standard input; `most` has the cap of each outlet, in bytes.

    Raises EnvError when it cannot be started.
    """
    with ExitStack() as ours:
        with ExitStack() as theirs:
            try:
                reads = [_sealed(content, theirs) for content in inlets]
                ends, (out, err, *writes) = zip(*(_pipe(ours, theirs) for _ in most), strict=True)
                popen |= {"stdin": reads[0], "stdout": out, "stderr": err, "pass_fds": [*reads[1:], *writes]}
                process = subprocess.Popen(command(reads[1:], writes), start_new_session=True, **popen)
            except OSError as error:
                raise EnvError(f"a sandbox cannot be started: {error}") from error
        try:
            output = _followed(process.pid, ends, most, time.monotonic() + seconds, memory)
        finally:
            # Its descendants first: a box whose maker dies while it is made would live on.
            for each in reversed(descendants(process.pid)):
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    output.code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return output


def _followed(pid: int, ends: Sequence[int], most: Sequence[int], until: float, memory: int | None) -> Output:
    """Reads until the process ends or reaches a limit."""
    output = Output(outlets=[bytearray() for _ in ends])
    with selectors.DefaultSelector() as selector, open(os.pidfd_open(pid)) as process:
        selector.register(process, selectors.EVENT_READ, -1)
        for index, end in enumerate(ends):
            selector.register(end, selectors.EVENT_READ, index)
        look, running = time.monotonic() + TICK_S, True
        while running and not output.ended:
            for key, _ in selector.select(max(0.0, min(until - time.monotonic(), TICK_S))):
                index: int = key.data
                if index < 0:
                    running = False
                elif not _more(key.fd, output.outlets[index]):
                    selector.unregister(key.fd)
                elif len(output.outlets[index]) > most[index]:
                    output.ended = "output"
            now = time.monotonic()
            if running and now >= until:
                output.ended = "time"
            elif running and memory is not None and now >= look:
                look = now + TICK_S
                output.ended = output.ended or ("memory" if holds_more(pid, memory) else "")
    for end, outlet, cap in zip(ends, output.outlets, most, strict=True):
        while len(outlet) <= cap and _more(end, outlet):
            pass
        if len(outlet) > cap:
            output.ended = output.ended or "output"
            del outlet[cap:]
    return output


def _sealed(content: bytes, stack: ExitStack) -> int:
    """A file in memory that nobody can change or let grow."""
    fd = os.memfd_create("sandbox", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def _pipe(ours: ExitStack, theirs: ExitStack) -> tuple[int, int]:
    """The end that we read, and the end that the program writes."""
    end, write = os.pipe()
    ours.callback(os.close, end)
    theirs.callback(os.close, write)
    os.set_blocking(end, False)
    return end, write


def _more(fd: int, into: bytearray) -> bool:
    """Read what is there; False at the end, and if nothing is there."""
    try:
        chunk = os.read(fd, 1 << 16)
    except BlockingIOError:
        return False
    into += chunk
    return bool(chunk)


def descendants(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for each in found:  # it grows
        with suppress(OSError):
            for children in Path(f"/proc/{each}/task").glob("*/children"):
                found += map(int, children.read_text().split())
    return found


def holds_more(pid: int, limit: int) -> bool:
    """Whether a process and all that descend from it hold more memory than `limit` bytes.

    Resident pages are counted first, because this is quick; only if they are more, a page that several processes share
    is counted once.
    """
    found = descendants(pid)
    limit -= _files(found[1]) if found[1:] else 0
    return all(sum(map(size, found)) > limit for size in (_resident, _proportional))


def _files(pid: int) -> int:
    """What the kernel holds for the files in a box, empty or not: some 1 KiB for each."""
    box, held = f"/proc/{pid}/root", 0
    with suppress(OSError):
        if os.stat(box).st_dev != os.stat("/").st_dev:  # else it is not made yet
            for folder in ("work", "tmp", "dev/shm"):
                system = os.statvfs(f"{box}/{folder}")
                held += (system.f_files - system.f_ffree) << 10
    return held


def _resident(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _proportional(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0
