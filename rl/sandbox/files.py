"""Which programs and files may the policy ask for? What no sandbox can take is an error of the policy."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from rl.environments.types import ToolError
from rl.sandbox.types import Content, Files
from rl.tools.command import with_python
from rl.typed import Checked

MOST_FILES, MOST_PATH, MOST_PART, MOST_ARGUMENTS, PAGE = 512, 1024, 255, 100_000, 4096


@dataclass(frozen=True, kw_only=True)
class Held(Checked):
    """The files of a sandbox between two runs. They are in our memory, so there is no link to follow."""

    disk_mib: int = 64
    """Most room for files. In a box it is memory too: as much for each of /work (its folder), /tmp and /dev/shm."""
    files: dict[str, bytes] = field(default_factory=dict[str, bytes], init=False, compare=False, repr=False)

    def start(self) -> None:
        """Begin without files."""
        self.files.clear()

    def stop(self) -> None:
        """Forget its files."""
        self.files.clear()

    def read(self, path: str) -> bytes:
        """A file that was written or kept."""
        if (content := self.files.get(name(path))) is None:
            raise ToolError(f"there is no file {path[:80]!r}")
        return content

    def write(self, path: str, content: Content) -> None:
        """Put a file into the runs that follow."""
        self.files.update(self.placed({**self.files, path: content}))

    def placed(self, files: Files) -> dict[str, bytes]:
        """Files as bytes. Raises ToolError if they do not fit, or if a file is also a folder."""
        found = {name(path): encoded(content) for path, content in files.items()}
        folders = {str(folder) for path in found for folder in PurePosixPath(path).parents}
        if both := folders & found.keys():
            raise ToolError(f"{min(both)[:80]!r} cannot be both a file and a folder")
        pages = len(folders) + sum(1 + -(-len(content) // PAGE) for content in found.values())
        if len(found) > MOST_FILES or pages * PAGE > self.disk_mib << 20:
            raise ToolError(f"a sandbox holds at most {MOST_FILES} files and {self.disk_mib} MiB")
        return found


def encoded(content: Content) -> bytes:
    """The bytes of a content."""
    return content.encode(errors="replace") if isinstance(content, str) else bytes(content)


def words(argv: Sequence[str], python: str) -> list[str]:
    """The arguments, with the path of the interpreter for "python". Raises ToolError if no system would take them."""
    if not argv or any("\0" in each for each in argv) or len(encoded("".join(argv))) > MOST_ARGUMENTS:
        raise ToolError(f"a command needs 1 word or more, without NUL, and at most {MOST_ARGUMENTS:,} bytes")
    return with_python([encoded(each).decode() for each in argv], python)


def name(path: str) -> str:
    """A path in the folder of a sandbox. Raises ToolError for any other."""
    parts = PurePosixPath(path).parts
    long = len(encoded(path)) > MOST_PATH or any(len(encoded(part)) > MOST_PART for part in parts)
    if not parts or path.startswith("/") or ".." in parts or "\0" in path or long:
        raise ToolError(f"{path[:80]!r} must be a relative path without '..', and not longer than a file's name may be")
    return encoded("/".join(parts)).decode()
