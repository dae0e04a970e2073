"""Boxes made by root and by nobody, and the reason why this machine has none."""

import os
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any

from rl.sandbox import Bubblewrap
from rl.sandbox.bubblewrap import NOBODY, found


def missing() -> str:
    """Why no box can be made here; empty: one can."""
    try:
        Bubblewrap().start()
    except ValueError as error:
        return str(error)
    return ""


class Here:
    """Makes boxes as the user of the tests."""

    def run(self, argv: list[str], *, settings: dict[str, Any] | None = None, **more: Any) -> Any:
        """What a run in a box returns, or the error that it raises."""
        try:
            return Bubblewrap(**(settings or {})).run(argv, **more)
        except Exception as error:
            return error

    def close(self) -> None:
        """Nothing to end."""


class AsNobody:
    """Makes boxes in a process of nobody. It is a fork, because nobody may not be able to start our interpreter."""

    def __init__(self) -> None:
        self.line, theirs = Pipe()
        self.pid = os.fork()
        if not self.pid:
            self.line.close()
            served(theirs)
        theirs.close()

    def run(self, argv: list[str], **more: Any) -> Any:
        self.line.send((argv, more))
        return self.line.recv()

    def close(self) -> None:
        self.line.close()
        os.waitpid(self.pid, 0)


def served(line: Connection) -> None:
    """The process of nobody: it answers until the line is closed."""
    try:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        found.cache_clear()
        while True:
            argv, more = line.recv()
            line.send(Here().run(argv, **more))
    except (EOFError, OSError, pickle.PickleError):
        pass
    finally:
        os._exit(0)


Maker = Callable[[], Here | AsNobody]
