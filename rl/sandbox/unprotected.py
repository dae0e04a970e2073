"""How do programs run where no sandbox can be had? As the user, with a deadline and a cap, and nothing else."""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rl.sandbox.capture import capture
from rl.sandbox.files import Held, encoded, words
from rl.sandbox.types import Content, Files, Ran

OUTPUT = 256 << 10
# Not found is the program's error, so a shell looks for it.
START = ["/bin/sh", "-c", 'exec "$@"', "sh"]


@dataclass(frozen=True, kw_only=True)
class Unprotected(Held):
    """No sandbox: a program of the policy can read, change and send whatever the user of the run can.

    For machines that hold nothing else, or for programs that you have read.
    """

    def run(
        self, argv: Sequence[str], *, stdin: Content = "", files: Files | None = None, timeout: float = 10.0
    ) -> Ran:
        """Run a program in a new folder."""
        command = [*START, *words(argv, sys.executable)]
        with tempfile.TemporaryDirectory(prefix="unprotected-", ignore_cleanup_errors=True) as folder:
            for path, content in self.placed({**self.files, **(files or {})}).items():
                (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / path).write_bytes(content)
            env = {"PATH": os.defpath, "LANG": "C.UTF-8"}
            given, most = [encoded(stdin)], [OUTPUT, OUTPUT]
            output = capture(lambda _, __: command, given, most, timeout, env=env, cwd=folder)
        return output.ran(output.code)
