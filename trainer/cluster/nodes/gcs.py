"""What does a cluster's head know? Asked without joining it: whether a token is right, and which nodes are alive."""

import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import ray._private.state
import ray._raylet
from ray.exceptions import AuthenticationError, RpcError

from trainer.node.node import Node
from trainer.node.token import with_token

raylet: Any = ray._raylet  # compiled, without stubs
PREEMPTION = 2
"""Ray's reason for draining a node that no node may refuse."""


def alive_nodes(head: str, token: Path) -> list[Any]:
    """Ray's records of the nodes of a cluster. Raises ValueError for a wrong token, OSError where no head answers."""
    use_token(token)
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        found = raylet.GcsClient(address=head).get_all_node_info(timeout=10)
    except AuthenticationError:
        raise ValueError(
            f"the head at {head} refuses this token: take the file `token` of the head's folder, and no other cluster's"
        ) from None
    except RpcError as error:
        raise OSError(f"the head at {head} does not answer: {error}") from None
    return [node for node in found.values() if node.state == 0]


def drain(node: Node, seconds: float) -> None:
    """Tell a cluster that this machine's node of it ends in so many seconds: runs take their engines away.

    Raises as `alive_nodes`, and KeyError where the cluster has no such node.
    """
    nodes = {(each.node_manager_hostname, each.temp_dir): each for each in alive_nodes(node.head, node.token)}
    place = socket.gethostname(), str(node.folder / "r")
    until = int((time.time() + seconds) * 1000)
    raylet.GcsClient(address=node.head).drain_node(nodes[place].node_id.hex(), PREEMPTION, "unison cluster stop", until)


def use_token(file: Path) -> None:
    """Let Ray in this process use the token of a file: it reads mode and token once, and both may be others by now."""
    environment = with_token(dict(os.environ), file)
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ.update(environment)
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def drained_nodes() -> set[str]:
    """Ray's ids of the nodes that are asked to leave the cluster of this process."""
    state: Any = ray._private.state.state  # pyright: ignore[reportPrivateUsage]
    return set(state.get_draining_nodes())
