"""How do programs run where no sandbox can be had? As the user, with a deadline and a cap, and nothing else."""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rl.environments.types import ToolError
from rl.sandbox import names
from rl.sandbox.capture import capture
from rl.sandbox.types import Content, Ran

ROOM, OUTPUT = 64 << 20, 256 << 10


class Unprotected:
    """No sandbox: a program of the policy can read, change and send whatever the user of the run can.

    For machines that hold nothing else, or for programs that you have read.
    """

    folder: Path

    def start(self) -> None:
        """Make a folder."""
        self.folder = Path(tempfile.mkdtemp(prefix="unprotected-"))

    def stop(self) -> None:
        """Remove it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def read(self, path: str) -> bytes:
        """A file of the folder."""
        try:
            return (self.folder / names.name(path)).read_bytes()
        except OSError as error:
            raise ToolError(f"{path[:80]!r} cannot be read: {error.strerror}") from error

    def write(self, path: str, content: Content) -> None:
        """Put a file there."""
        for name, written in names.placed({path: content}, ROOM).items():
            try:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_bytes(written)
            except OSError as error:
                raise ToolError(f"{path[:80]!r} cannot be written: {error.strerror}") from error

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: Content = "",
        files: Mapping[str, Content] | None = None,
        timeout: float = 10.0,
    ) -> Ran:
        """Run a program in the folder."""
        for path, content in (files or {}).items():
            self.write(path, content)
        command = names.command(argv, sys.executable)
        if not shutil.which(command[0], path=f"{self.folder}:{os.defpath}"):
            return Ran(stdout="", stderr=f"{command[0]}: not found", code=127)
        output = capture(
            lambda reads, writes: command,
            inlets=[names.data(stdin)],
            most=[OUTPUT, OUTPUT],
            seconds=timeout,
            env={"PATH": os.defpath, "LANG": "C.UTF-8"},
            cwd=str(self.folder),
        )
        out, err = (bytes(each).decode(errors="replace") for each in output.outlets)
        code = output.code if output.code >= 0 else 128 - output.code
        return Ran(
            stdout=out, stderr=err, code=code, timed_out=output.ended == "time", truncated=output.ended == "output"
        )
