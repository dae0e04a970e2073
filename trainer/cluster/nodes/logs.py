"""The output of an actor's process, also where it ran on another node."""

import asyncio
import re
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trainer.cluster.ray_session import log_folder

TAIL = 1 << 18
"""Bytes of each file that are read."""
SECONDS = 20.0
"""Within which another node must answer."""


def read(pid: int) -> tuple[str, str]:
    """The folder of this node's logs, and the end of what a process and its children wrote there."""
    folder = log_folder()
    texts = [path.read_bytes()[-TAIL:].decode(errors="replace") for path in Path(folder).glob(f"worker-*-{pid}.*")]
    return folder, "\n".join(texts)


async def output(report: str) -> tuple[str, str]:
    """Where the process that a report of Ray's names has its logs, and their end."""
    pids, addresses = re.findall(r"\bpid=(\d+)", report), re.findall(r"\bip=([\w.:]*\w)", report)
    if not pids:
        return log_folder(), ""
    pid, address = int(pids[0]), (addresses or [""])[0]
    nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    if address not in nodes or nodes[address] == ray.get_runtime_context().get_node_id():
        return read(pid)
    here = NodeAffinitySchedulingStrategy(nodes[address], soft=False)
    try:
        async with asyncio.timeout(SECONDS):
            folder, text = await ray.remote(read).options(num_cpus=0, scheduling_strategy=here).remote(pid)
    except (TimeoutError, RayError) as error:
        return f"{address} (which does not answer: {type(error).__name__})", ""
    return f"{address}:{folder}", text
