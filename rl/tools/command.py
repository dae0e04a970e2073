"""Which program does "python" mean in a command?"""

import sys
from collections.abc import Sequence


def with_python(command: Sequence[str], python: str = sys.executable) -> list[str]:
    """The words of a command, with an interpreter's path for the first one if that is "python".

    By default the run's own interpreter: the one on PATH may be another, without the packages of the run.
    """
    return [python if command[0] == "python" else command[0], *command[1:]]
