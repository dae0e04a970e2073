"""Which message does an error end with? One for a user's mistake, the user's own lines for a fault of their code."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import PicklingError

from rl import checkout
from rl.errors import first_error
from rl.typed import shortened
from trainer.runs.summary import MOST
from trainer.tracking.terminal import console, flush_output

USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, PicklingError)
LINES = 3
"""Frames of the user's code that are shown."""
_FRAME = re.compile(r'File "(.+)", line (\d+), in (\S+)\n +(.+)')


@contextmanager
def readable_errors() -> Iterator[None]:
    """End the process with one message: exit status 2 for what a user can fix, 1 for any other error, 130 at Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("UNISON_TRACEBACK"):
            raise
        first = first_error(error) if isinstance(error, ExceptionGroup) else error
        console.print(f"[bold red]{type(first).__name__}[/]: ", end="")
        console.print(explained(first), markup=False, highlight=False)
        sys.exit(2 if can_be_fixed(first) else 1)
    finally:
        flush_output()


def can_be_fixed(error: BaseException) -> bool:
    """Whether a user can fix it: shown as one message. UNISON_TRACEBACK=1 shows where it came from.

    So are the RuntimeErrors that our packages define, such as StallError. Importing them would take torch, and seconds
    of `unison cluster`, which needs none.
    """
    ours = any(each.__module__.partition(".")[0] in checkout.PACKAGES for each in type(error).__mro__)
    return isinstance(error, USER_ERRORS) or (ours and isinstance(error, RuntimeError))


def explained(error: BaseException) -> str:
    """The message of an error, what to do where that is known, and the lines of the user's code that raised it."""
    text = [shortened(str(error) or "(no message)", MOST)]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text.append("The disk is full, or your quota on it is used up: make space, then resume")
    lines = list(users_lines(error))
    if lines:
        text.append("It was raised in your code:\n" + "\n".join(lines[-LINES:]))
    elif not can_be_fixed(error):
        text.append(
            f"It was raised at {_place(error)}, in no code of yours. UNISON_TRACEBACK=1 shows the whole traceback; "
            "please report it"
        )
    return "\n".join(text)


def users_lines(error: BaseException) -> Iterator[str]:
    """The frames of an error, and of what it was raised from, that are in neither this package nor a library."""
    for each in _chain(error):
        frames = [(f.filename, f.lineno, f.name, f.line) for f in traceback.extract_tb(each.__traceback__)]
        # An error of an actor has the traceback of its process as text.
        for file, line, name, source in [*frames, *_FRAME.findall(str(each))]:
            if _is_users(file):
                yield f"  {os.path.relpath(file)}:{line} in {name}: {source}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_users(file: str) -> bool:
    path = Path(file)
    ours = any(path.is_relative_to(checkout.ROOT / package) for package in checkout.PACKAGES)
    return path.is_absolute() and not ours and not checkout.is_installed(path)


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"
