"""Why an actor did not start: the line of its traceback, or of its children's output, that a user can act on."""

import re

ERROR = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt)): (.+(?:\n  +\S.*)*)", re.MULTILINE)
PREFIX = re.compile(r"^(?:\x1b\[[\d;]*m)?\(\w+ pid=\d+\)(?:\x1b\[[\d;]*m)? (?:[A-Z]+ [\d-]+ [\d:]+ \[\S+\] )?", re.M)
"""vLLM's process, level and place at the start of each line, with their colours."""
CHILD = "Engine core initialization failed"
"""vLLM's message when the cause is in the output of its core process."""


class StartError(RuntimeError):
    """An actor could not be built; the message holds the cause and the path of its full output."""


def root_cause(traceback: str, output: str) -> str:
    """The last error named in an actor's traceback, at most 600 characters.

    Where that only points at vLLM's core process, the last one in the actor's output.
    """
    found = ERROR.findall(traceback)
    if found and CHILD in found[-1][1]:
        found += [each for each in ERROR.findall(PREFIX.sub("", output)) if CHILD not in each[1]]
    if not found:
        return traceback.strip().splitlines()[-1][:600]
    kind, message = found[-1]
    return f"{kind}: {' '.join(message.split())}"[:600]
