"""What does a cluster's head know? Asked without joining it: whether a token is right, and which nodes are alive."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray._raylet
from ray.exceptions import AuthenticationError, RpcError

from trainer.node.token import with_token

raylet: Any = ray._raylet  # compiled, without stubs


@dataclass(frozen=True)
class Alive:
    """A node that is alive."""

    host: str
    address: str


def alive_nodes(head: str, token: Path) -> list[Alive]:
    """The nodes of a cluster. Raises ValueError for a wrong token, OSError where the head does not answer."""
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
    nodes = [node for node in found.values() if node.state == 0]
    return [Alive(node.node_manager_hostname, node.node_manager_address) for node in nodes]


def use_token(file: Path) -> None:
    """Let Ray in this process use the token of a file: it reads mode and token once, and both may be others by now."""
    environment = with_token(dict(os.environ), file)
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ.update(environment)
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def check_token(head: str, token: Path) -> None:
    """Raise ValueError where the head refuses a token."""
    alive_nodes(head, token)
