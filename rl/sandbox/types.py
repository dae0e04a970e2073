"""What does every sandbox do? The protocol, and what one run of a program returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

Content = str | bytes
"""Text is written as UTF-8."""
Files = Mapping[str, Content]
"""Contents by path, relative to the folder in which programs run."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a program did. All of it is the program's own doing: an observation, or something to score."""

    stdout: str
    """As UTF-8; bytes that are none are replaced."""
    stderr: str
    code: int
    """Its exit status; 128 and the signal's number if a signal ended it."""
    timed_out: bool = False
    truncated: bool = False
    """Whether it was ended because it wrote more than the sandbox reads."""

    @property
    def well(self) -> bool:
        """Whether it ended by itself, in time, with the status 0."""
        return self.code == 0 and not self.timed_out and not self.truncated


@runtime_checkable
class Sandbox(Protocol):
    """Runs programs of the policy. `start` comes first and `stop` last, also after an error.

    Raises ToolError for what the policy asked for and cannot have, such as a file that does not exist, and EnvError
    when the sandbox itself fails. `start` raises ValueError, with the remedy, where the sandbox cannot work at all.
    """

    def start(self) -> None:
        """Make it ready."""

    def run(
        self, argv: Sequence[str], *, stdin: Content = "", files: Files | None = None, timeout: float = 10.0
    ) -> Ran:
        """Run a program, for at most `timeout` seconds, in a folder with `files` and those that were written.

        `argv[0]` may be "python": the sandbox's own interpreter.
        """
        ...

    def read(self, path: str) -> bytes:
        """A file of that folder."""
        ...

    def write(self, path: str, content: Content) -> None:
        """Put a file there for the runs that follow."""

    def stop(self) -> None:
        """End it; its files are lost."""
