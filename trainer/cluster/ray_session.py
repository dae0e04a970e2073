"""Ray itself: join or start it, count its GPUs, find its logs."""

import os

import ray
import torch

from trainer.cluster.placement import Placement
from trainer.cluster.process_env import ray_environment


def start_ray(placement: Placement) -> bool:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine; returns whether it was started."""
    if os.environ.get("RAY_ADDRESS"):
        join_ray()
        return False
    with ray_environment():
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            num_cpus=max(os.cpu_count() or 1, placement.engines + placement.learners),
            _node_ip_address="127.0.0.1",
        )
    return True


def join_ray() -> None:
    """Connect to the cluster that RAY_ADDRESS names. Idempotent: GPUs are counted before the run connects."""
    ray.init(log_to_driver=False, logging_level="warning", ignore_reinit_error=True)


def cluster_gpus() -> float:
    """GPUs of the cluster that RAY_ADDRESS names, else of this machine."""
    if not os.environ.get("RAY_ADDRESS"):
        return float(torch.cuda.device_count())
    join_ray()
    return ray.cluster_resources().get("GPU", 0.0)


def log_folder() -> str:
    """Where Ray keeps the output of every actor of this session."""
    node = ray.worker.global_worker.node
    return f"{node.get_session_dir_path()}/logs" if node else "Ray's session folder"
