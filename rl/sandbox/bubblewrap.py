"""How does a program run in a box of its own? Bubblewrap: namespaces, limits and a new file system for each run."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rl.environments.types import EnvError, ToolError
from rl.sandbox.capture import Output, capture
from rl.sandbox.files import MOST_FILES, PAGE, Held, encoded, words
from rl.sandbox.probe import NO_PYTHON, Tools, cause, refusal, tools_here
from rl.sandbox.seccomp import deny
from rl.sandbox.types import Content, Files, Ran

NOBODY = 65534
STATUS_BYTES = 4096
PYTHONS = ("/usr/bin/python3", "/usr/local/bin/python3", os.path.realpath(sys.executable))
"""Interpreters of the system come first, because one below a home is readable to its owner alone."""
TRIAL = "import os; child = os.fork(); child or os._exit(0); os.waitpid(child, 0); print('works')"
SPACES = "--unshare-all --unshare-user --disable-userns --die-with-parent --new-session --as-pid-1 --hostname box"
VARIABLES = "--setenv PATH /usr/local/bin:/usr/bin:/bin --setenv HOME /work --setenv LANG C.UTF-8"
CLOSED = "--remount-ro /dev --remount-ro / --chdir /work"
# Runs inside the box, and writes the files that the program left.
KEEP = """
import os, sys
child = os.fork()
if not child:
    os.close(int(sys.argv[1]))
    try:
        os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(127)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
with open(int(sys.argv[1]), "wb") as out:
    for path in (os.path.join(folder, name)[2:] for folder, _, names in os.walk(".") for name in names):
        if os.path.isfile(path) and not os.path.islink(path):
            with open(path, "rb") as file:
                content = file.read()
            out.write(b"%d %d " % (len(os.fsencode(path)), len(content)) + os.fsencode(path) + content)
os._exit(code if code >= 0 else 128 - code)
"""


@dataclass(frozen=True, kw_only=True)
class Bubblewrap(Held):
    """A new box for each run: no network, no process and no file of the machine but /usr, and limits.

    Without `keep` and `write` one object may serve many threads, because runs share nothing.
    """

    memory_mib: int = 512
    """Most memory of a program: in each process, and in all together."""
    processes: int = 32
    """Most processes and threads at the same time."""
    output_kib: int = 256
    """Most output of each kind. A program that writes more is ended."""
    keep: bool = False
    """Whether the files that a program leaves in /work are there in the next run, and for `read`. If a limit ended the
    program, they are as before the run. Costs some 10 ms."""
    python: str = ""
    """The interpreter. Default: the first that works of /usr/bin/python3, /usr/local/bin/python3 and our own."""
    readable: tuple[str, ...] = ()
    """Other folders of the machine that programs may read, such as that of a compiler."""

    def __post_init__(self) -> None:
        for name in ("disk_mib", "memory_mib", "processes", "output_kib"):
            if getattr(self, name) < 1:
                raise ValueError(f"Bubblewrap: {name}={getattr(self, name)} must be at least 1")
        if self.python and not os.path.isabs(self.python):
            raise ValueError(f"Bubblewrap: python={self.python!r} must be a whole path, such as '/usr/bin/python3'")

    def start(self) -> None:
        """Look once whether a box can be made here. Raises ValueError that names what is missing."""
        found(self)
        self.files.clear()

    def run(
        self, argv: Sequence[str], *, stdin: Content = "", files: Files | None = None, timeout: float = 10.0
    ) -> Ran:
        """Run a program in a new box."""
        tools, python = found(self)
        placed = self.placed({**self.files, **(files or {})})
        output = self.boxed(tools, python, words(argv, python), encoded(stdin), placed, timeout)
        code, note = exit_code(output), ""
        if code is None and not output.ended:
            raise EnvError(f"a box did not start: {cause(output.outlets[1])}")
        if output.ended == "memory":
            note = f"\nended: it held more than {self.memory_mib} MiB of memory"
        elif self.keep and not output.ended:
            try:
                kept = self.placed(listed(bytes(output.outlets[3])))
                self.files.clear()
                self.files.update(kept)
            except ToolError as error:
                note = f"\nits files are lost: {error}"
        return output.ran(code or 0, note)

    def boxed(
        self, tools: Tools, python: str, command: list[str], stdin: bytes, files: dict[str, bytes], seconds: float
    ) -> Output:
        """Run a command in a box; the third outlet has what bwrap reports, the fourth, with `keep`, the files left."""
        memory, disk, output = self.memory_mib << 20, self.disk_mib << 20, self.output_kib << 10
        limits = {
            "nproc": self.processes,
            "as": memory,
            "fsize": disk,
            "nofile": 64,
            "core": 0,
            "cpu": int(seconds) + 1,
        }

        def line(reads: list[int], writes: list[int]) -> list[str]:
            box = [*tools.outside(NOBODY), *SPACES.split(), *VARIABLES.split(), *mounts(python, self.readable)]
            for path in ("/dev/shm", "/tmp", "/work"):
                box += ["--size", str(disk), "--tmpfs", path]
            for path, fd in zip(files, reads[1:], strict=True):
                box += ["--perms", "0644", "--file", str(fd), f"/work/{path}"]
            box += [*CLOSED.split(), "--seccomp", str(reads[0]), "--json-status-fd", str(writes[0]), "--"]
            box += [tools.prlimit, *(f"--{name}={value}" for name, value in limits.items()), "--"]
            return [*box, *([python, "-I", "-S", "-c", KEEP, str(writes[1])] if self.keep else []), *command]

        inlets, most = [stdin, deny(), *files.values()], [output, output, STATUS_BYTES]
        most += [disk + MOST_FILES * PAGE] if self.keep else []
        # The folder of the run may be closed to nobody, so it is not that of bwrap.
        return capture(line, inlets, most, seconds, memory, env={}, cwd="/")


@cache
def found(box: Bubblewrap) -> tuple[Tools, str]:
    """The programs that make a box, and the interpreter in it, after a trial. Raises ValueError if it does not work."""
    tools, why = tools_here(), ""
    for python in (box.python,) if box.python else PYTHONS:
        output = box.boxed(tools, python, [python, "-I", "-S", "-c", TRIAL], b"", {}, 60.0)
        if bytes(output.outlets[0]).strip() == b"works":
            return tools, python
        why = why or (cause(output.outlets[1]) if exit_code(output) is None else "")
    raise ValueError(refusal(why or NO_PYTHON))


def mounts(python: str, readable: Sequence[str]) -> list[str]:
    """What of the machine is in the box, to be read."""
    line = ["--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev"]
    for path in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(path):
            line += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            line += ["--ro-bind", path, path]
    for path in ("/etc/ld.so.cache", "/etc/alternatives"):
        line += ["--ro-bind-try", path, path]
    for path in (*readable, *(() if python.startswith("/usr/") else (str(Path(python).parents[1]),))):
        line += ["--ro-bind", path, path]
    return line


def exit_code(output: Output) -> int | None:
    """The exit status of the program, from bwrap's own reports; None: bwrap did not get so far."""
    reports = [json.loads(line) for line in output.outlets[2].splitlines()]
    return next((report["exit-code"] for report in reports if "exit-code" in report), None)


def listed(left: bytes) -> dict[str, bytes]:
    """The files that a program left. It may have written this list itself, so nothing in it is taken for granted."""
    files: dict[str, bytes] = {}
    try:
        while left:
            path, size, left = left.split(b" ", 2)
            cut, end = int(path), int(path) + int(size)
            if not 0 < cut <= end <= len(left):
                raise ValueError(size)
            files[left[:cut].decode(errors="replace")], left = left[cut:end], left[end:]
    except ValueError as error:
        raise ToolError("they cannot be read") from error
    return files
