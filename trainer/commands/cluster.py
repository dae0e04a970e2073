"""`unison cluster`: nodes of a Ray cluster with a token, fixed ports and a folder of their own."""

import argparse
import time
from collections.abc import Sequence

from trainer.node import network, ports
from trainer.node.attach import chosen
from trainer.node.node import start, stay
from trainer.node.processes import has_engines
from trainer.node.token import read_token
from trainer.tracking.terminal import console


def cluster(arguments: Sequence[str]) -> int:
    """Start a head, join one, wait for nodes, end this node's part."""
    parser = argparse.ArgumentParser(
        prog="unison cluster",
        description="A Ray cluster for runs on several nodes. Whoever connects needs its token, which lies in a file "
        "of mode 0600 in the cluster's folder on each node (/tmp/unison-ray-PORT).",
        epilog="Runs: RAY_ADDRESS=HOST:PORT python RECIPE.py on a node of the cluster; RAY_ADDRESS=auto takes the only "
        "cluster of yours on this node.",
        allow_abbrev=False,
    )
    words = parser.add_subparsers(dest="word", required=True, metavar="head|join|wait|folder|stop")
    for word, text in (("head", "start a cluster on this node"), ("join", "join a cluster with this node")):
        one = words.add_parser(word, help=text, description=f"{text.capitalize()}.", allow_abbrev=False)
        if word == "join":
            one.add_argument("address", metavar="HOST:PORT", help="the head's address")
            one.add_argument("--timeout", type=float, default=0.0, help="seconds to wait for the head (default: 0)")
        one.add_argument("--token-file", metavar="FILE", help="file with the token (mode 0600); -: standard input. "
                         "Without it the variable UNISON_CLUSTER_TOKEN; a head makes one")  # fmt: skip
        one.add_argument("--interface", metavar="NAME|ADDRESS", help="network interface for Ray, gloo and NCCL "
                         "(default: the one of the route)")  # fmt: skip
        one.add_argument("--port-base", type=int, metavar="PORT", help=f"first of {ports.SPAN} ports "
                         "(default: a free block below the ephemeral ports)")  # fmt: skip
        one.add_argument("--cpus", type=int, help="CPUs that Ray may give to actors here (default: all)")
        one.add_argument("--gpus", type=int, help="GPUs of this node (default: all)")
        one.add_argument("--block", action="store_true", help="stay until SIGTERM, Ctrl-C, or until the head is gone; "
                         "then end this node's part")  # fmt: skip
        if word == "head":
            one.add_argument("--join-line", action="store_true", help="also print the whole command to join, which "
                             "holds the token")  # fmt: skip
    one = words.add_parser("wait", help="wait for nodes", description="Wait until nodes have joined.")
    one.add_argument("nodes", nargs="+", metavar="N|HOST", help="how many nodes, or the names of all of them")
    one.add_argument("--timeout", type=float, default=300.0, help="seconds (default: 300)")
    two = words.add_parser("stop", help="end this node's part", description="End this node's part of a cluster.")
    two.add_argument("--drain", type=float, default=0.0, metavar="SECONDS", help="first let runs with "
                     "rollout.max_engines take their engines away, for at most so long (default: 0)")  # fmt: skip
    three = words.add_parser("folder", help="print its folder here", description="Print a cluster's folder.")
    for each in (one, two, three):
        each.add_argument("--port-base", type=int, metavar="PORT", help="which cluster, where there are several")
    asked = parser.parse_args(arguments)
    return {"head": begin, "join": begin, "wait": wait, "folder": folder, "stop": stop}[asked.word](asked)


def begin(asked: argparse.Namespace) -> int:
    """Start the head, or join one."""
    head = getattr(asked, "address", None)
    token = read_token(asked.token_file)
    if head and not token:
        raise ValueError("joining needs the token: --token-file FILE, a copy of the head's /tmp/unison-ray-PORT/token")
    # Imported late: Ray takes seconds that `--help` does not need.
    from trainer.cluster.nodes.gcs import alive_nodes

    until = time.monotonic() + (asked.timeout if head else 0.0)
    while head and time.monotonic() < until and not network.answers(*network.split(head)):
        time.sleep(1)
    options = [f"--num-{kind}={n}" for kind in ("cpus", "gpus") if (n := getattr(asked, kind)) is not None]
    node = start(head, token=token, interface=asked.interface, base=asked.port_base, options=options, check=alive_nodes)
    lines = [f"{'joined' if head else 'head of'} the cluster at {node.head}: folder {node.folder}"]
    if not head:
        lines += [
            f"on other nodes, with a copy of {node.token}: unison cluster join {node.head} --token-file FILE",
            f"runs, on a node of the cluster: RAY_ADDRESS={node.head} python RECIPE.py",
        ]
        if asked.join_line:
            lines.append(f"unison cluster join {node.head} --token-file - <<< {node.token.read_text()}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if asked.block:
        why = stay(node)
        console.print(f"{why}: {node.end()} processes ended", highlight=False)
    return 0


def wait(asked: argparse.Namespace) -> int:
    """Wait for nodes. Raises ValueError that names those that are missing."""
    from trainer.cluster.nodes.gcs import alive_nodes

    node = chosen(asked.port_base)
    names = [] if asked.nodes[0].isdigit() else asked.nodes
    wanted = len(names) or int(asked.nodes[0])
    until, hosts, told = time.monotonic() + asked.timeout, list[str](), -1
    while time.monotonic() < until:
        if network.answers(*network.split(node.head)):
            hosts = [each.node_manager_hostname for each in alive_nodes(node.head, node.token)]
        if len(hosts) != told:
            console.print(f"{len(hosts)} of {wanted} nodes", highlight=False)
            told = len(hosts)
        missing = {short(name) for name in names} - {short(host) for host in hosts}
        if len(hosts) >= wanted and not missing:
            return 0
        time.sleep(0.5)
    who = f"{', '.join(sorted(missing))} did not join" if names else f"{len(hosts)} of {wanted} nodes joined"
    raise ValueError(
        f"{who} the cluster at {node.head} within {asked.timeout:g} s (there: {', '.join(hosts) or 'none'}). Look at "
        f"what `unison cluster join` printed on the missing node, and at `RAY_AUTH_MODE=token "
        f"RAY_AUTH_TOKEN_PATH={node.token} ray status --address {node.head}` here"
    )


def folder(asked: argparse.Namespace) -> int:
    """Print the folder, for scripts."""
    print(chosen(asked.port_base).folder)
    return 0


def stop(asked: argparse.Namespace) -> int:
    """End this node's part of a cluster; other clusters and other Rays stay."""
    node, until = chosen(asked.port_base), time.monotonic() + asked.drain
    if asked.drain:
        from trainer.cluster.nodes.gcs import drain

        drain(node, asked.drain)
        while time.monotonic() < until and has_engines(node.folder):
            time.sleep(0.5)
    console.print(f"{node.folder}: {node.end()} processes ended", highlight=False)
    return 0


def short(host: str) -> str:
    """A host's name without its domain."""
    return host.partition(".")[0]
