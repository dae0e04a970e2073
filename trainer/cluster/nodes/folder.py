"""Is the run's folder the same one on every node? Ranks read what the driver wrote there, and the driver what they did.

Else checkpoints and the final model go to another machine's disk, and the run ends as if nothing were wrong.
"""

import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

NAME = ".same-folder-"


def write_word(folder: Path) -> str:
    """The driver's part: a new word in a file; returns the word."""
    word = secrets.token_hex(8)
    (folder / f"{NAME}driver").write_text(word)
    return word


def answer_word(folder: str, index: int) -> tuple[str, str, str]:
    """A node's part: its host, the word that it read, and why it could not; it writes the word back."""
    host, path = socket.gethostname(), Path(folder)
    try:
        word = (path / f"{NAME}driver").read_text()
        (path / f"{NAME}{index}").write_text(word)
    except OSError as error:
        return host, "", f"{type(error).__name__}: {error.strerror}"
    return host, word, ""


def judge(folder: Path, word: str, answers: Sequence[tuple[str, str, str]]) -> list[str]:
    """What is wrong with the folder for each that answered, "" where nothing is. Removes the files."""
    found = []
    for index, (host, read, why) in enumerate(answers):
        back = folder / f"{NAME}{index}"
        if read == word and back.exists() and back.read_text() == word:
            found.append("")
            continue
        why = why or ("it reads another file" if read != word else "the driver does not see what it writes")
        found.append(
            f"the folder {folder} on {host} is not the driver's ({why}), so checkpoints and the model would be lost: "
            "put it on a file system that all nodes mount at the same path (--output-dir)"
        )
    for path in folder.glob(f"{NAME}*"):
        with suppress(OSError):
            path.unlink()
    return found
