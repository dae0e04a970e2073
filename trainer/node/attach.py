"""Which cluster of this user does a driver or a command mean?"""

import os
import socket
from pathlib import Path

from trainer.node import ports
from trainer.node.node import Node, job


def chosen(base: int | None) -> Node:
    """This user's cluster here with these ports, or of this job, or the only one. Raises ValueError."""
    found = [Node(folder) for folder in ports.mine()]
    wanted = [node for node in found if base in (None, node.base)]
    if base is None and job():
        wanted = [node for node in found if (node.folder / "job").read_text() == job()]
    if len(wanted) == 1:
        return wanted[0]
    known = ", ".join(f"--port-base {node.base} ({node.head})" for node in found)
    here = f"user {os.getuid()} on {socket.gethostname()}"
    raise ValueError(
        f"{here} has several clusters: name one of {known}" if wanted else
        f"{here} has no {'such ' if found else ''}cluster{f': there is {known}' if found else ''}"
    )  # fmt: skip


def attach() -> Path | None:
    """The token's file of the cluster that RAY_ADDRESS names, where it is one of `unison cluster` on this node.

    "auto" is the only cluster of this user here: Ray itself would take any Ray of the machine, also another user's.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    found = [Node(folder) for folder in ports.mine()]
    if address == "auto" and found:
        address = os.environ["RAY_ADDRESS"] = chosen(None).head
    return next((node.token for node in found if node.head == address), None)
