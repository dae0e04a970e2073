"""Where does each actor run, and in which order are the ranks numbered? By node and device, the driver's node first."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import ray


@dataclass(frozen=True)
class Seat:
    """Where one process runs."""

    node: str
    """Ray's id of the node."""
    address: str
    devices: tuple[int, ...]
    """Its GPUs, in the node's numbers; none on CPU."""


def own_seat() -> Seat:
    """That of the process that calls it."""
    context = ray.get_runtime_context()
    devices = tuple(int(i) for i in context.get_accelerator_ids().get("GPU", []) if i.isdigit())
    return Seat(context.get_node_id(), ray.util.get_node_ip_address(), devices)


def own_node(gpus: float) -> str:
    """Ray's resource that only the driver's node has, where that node has so many GPUs; else ""."""
    mine = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == mine)
    return f"node:{node['NodeManagerAddress']}" if node["Resources"].get("GPU", 0.0) >= gpus else ""


def in_order(seats: Sequence[Seat], driver: str, size: int = 1) -> list[int]:
    """Positions of the seats by rank. Each `size` neighbours, which share rows and have one bundle, stay together.

    The node of the driver, where the run's folder is, comes first; then nodes and devices count.
    """
    groups = [list(range(i, i + size)) for i in range(0, len(seats), size)]
    key = {i: (seat.node != driver, seat.address, seat.node, seat.devices, i) for i, seat in enumerate(seats)}
    inside = [sorted(group, key=key.__getitem__) for group in groups]
    for group in inside:
        assert len({seats[i].node for i in group}) == 1, "a bundle lies on one node"
    return [i for group in sorted(inside, key=lambda group: key[group[0]]) for i in group]


def packs(units: Sequence[float], nodes: Sequence[float]) -> bool:
    """Whether units of GPUs, none of which may be divided, fit on nodes with so many each.

    Exact where each size divides the next larger one, as powers of two do; else it may say yes for what does not fit.
    """
    sizes = sorted({unit for unit in units if unit >= 1})
    free = sorted(nodes, reverse=True)
    if any(b % a for a, b in pairwise(sizes)):
        return not units or max(units) <= max(free, default=0)
    for unit in sorted(units, reverse=True):
        room = next((i for i, gpus in enumerate(free) if gpus >= unit), None)
        if room is None:
            return False
        free[room] -= unit
    return True
