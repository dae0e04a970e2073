"""Ray itself: join or start it, count its GPUs, find its logs."""

import os
import secrets
import socket

import ray
import torch

from trainer import machine
from trainer.cluster.nodes.code import beside_recipe
from trainer.cluster.nodes.gcs import use_token
from trainer.cluster.placement import Placement
from trainer.cluster.process_env import ray_environment
from trainer.node.attach import attach

LEAST_STORE = 256 << 20
"""Bytes of the smallest object store in shared memory; batches and their log-probabilities pass through it."""
ANSWER_S = 10.0
"""Seconds for a cluster's head to take a connection."""


def start_ray(placement: Placement) -> bool:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine; returns whether it was started."""
    if os.environ.get("RAY_ADDRESS"):
        join_ray()
        return False
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        # Else Ray writes one into the home folder, which may be read-only, and which two runs may do at once. It stays
        # for later sessions of this process, because Ray remembers the first.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    with ray_environment(placement.device):
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            num_cpus=max(machine.cores(), placement.actors),
            object_store_memory=object_store_bytes(machine.shared_memory()),
            _node_ip_address="127.0.0.1",
        )
    return True


def object_store_bytes(free: int) -> int | None:
    """Bytes of Ray's object store, given those that are free in /dev/shm: half, because the weights need room too.

    None where that is too little: Ray then keeps its objects in files. What it maps it does not reserve, so with its
    own default (30 % of the memory) a full /dev/shm would kill whoever writes next.
    """
    return min(free // 2, int(0.3 * machine.memory())) if free // 2 >= LEAST_STORE else None


def join_ray() -> None:
    """Connect to the cluster that RAY_ADDRESS names. Idempotent: GPUs are counted before the run connects."""
    if token := attach():
        use_token(token)
    if ray.is_initialized():
        return
    host, _, port = (address := os.environ["RAY_ADDRESS"]).rpartition(":")
    if port.isdigit() and "://" not in address:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
        except OSError as error:  # Ray itself would ask for more than a minute
            raise ValueError(f"no cluster answers at RAY_ADDRESS={address} ({error}): `unison cluster head`") from None
    modules = beside_recipe()
    # An empty list is an error of Ray's on every node.
    shipped = {"py_modules": modules} if modules else None
    ray.init(log_to_driver=False, logging_level="error", runtime_env=shipped)


def gpus_of_nodes() -> list[float]:
    """GPUs of each node of the cluster that RAY_ADDRESS names, else of this machine."""
    if not os.environ.get("RAY_ADDRESS"):
        return [float(torch.cuda.device_count())]
    join_ray()
    return [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]]


def log_folder() -> str:
    """Where Ray keeps the output of every actor of this session."""
    node = ray.worker.global_worker.node
    return f"{node.get_session_dir_path()}/logs" if node else "Ray's session folder"
