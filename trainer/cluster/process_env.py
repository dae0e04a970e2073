"""What the processes of a run start with: environment variables, and a config that can be sent to actors."""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any
from unittest.mock import DEFAULT, patch

from ray import _raylet, cloudpickle
from ray._private import utils
from ray._private.node import Node

from rl import checkout
from rl.config import Config
from rl.typed import shortened
from trainer.cluster.placement import Device


def memory_kept(device: Device) -> dict[str, str]:
    """Settings of glibc with which a process keeps what it frees, in one place: the next pass or update needs as much,
    and to get fresh pages takes longer than to fill them. It reads them when a process starts."""
    kept = {"MALLOC_ARENA_MAX": 1, "MALLOC_MMAP_THRESHOLD_": 2**30, "MALLOC_TRIM_THRESHOLD_": 2**31 - 1}
    return {name: os.environ.get(name, str(value)) for name, value in kept.items() if device == "cpu"}


UNUSED = ("start_api_server", "start_monitor", "start_log_monitor")
"""Ray's dashboard, for whose start it waits a second, its scaler, and what copies the actors' output to the driver."""
AGENT = {"METRICS_AGENT_PORT_NAME", "METRICS_EXPORT_PORT_NAME", "DASHBOARD_AGENT_LISTEN_PORT_NAME"}
"""Ray's names of the ports of the dashboard's agent, which needs none without a dashboard."""
ANSWER_BYTES = 400_000
"""Size up to which an answer is in the message that it is there: 8 replies of 4,096 tokens. Through the object store a
call takes 0.6 ms more; answers of 2 MB in messages, such as the doctor's, may cost an engine 0.3 GiB."""
SOON_S, LATE_S = 0.02, 5.0
"""Seconds between two looks for the node, and after which Ray itself waits for it and reports."""
RAYLET = vars(_raylet)
"""Names of Ray's compiled part, some of which another version may lack."""


def started_soon(node: Any, *args: Any, start: Any = Node.start_raylet, **more: Any) -> None:
    """Start the process of Ray's node, and wait until the head knows it: Ray itself asks once a second. The node would
    wait for its agent's ports, so it finds first what the agent writes later: that there are none."""
    for name in AGENT & RAYLET.keys():
        RAYLET["persist_port"](node.get_session_dir_path(), node.node_id, RAYLET[name], -1)
    start(node, *args, **more)
    end = time.monotonic() + LATE_S
    while time.monotonic() < end and not node.get_gcs_client().get_all_node_info():
        time.sleep(SOON_S)


@contextmanager
def ray_environment(device: Device = "cuda") -> Iterator[None]:
    """Settings of Ray while it starts: no warnings about defaults that change, no usage reports, workers at normal
    priority (its default of nice 15 starves them next to any other process), and no workers started for tasks. Its
    parts look for each other each 20 ms and not each second, and those that no run uses are not started (or are, as the
    dashboard's agent, without what that needs). Its workers can import what this process can, and keep their memory.
    Answers of up to `ANSWER_BYTES` come without the object store."""
    wanted = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    wanted |= {"RAY_max_direct_call_object_size": str(ANSWER_BYTES), "RAY_prestart_worker_first_driver": "0"}
    wanted |= {"PYTHONPATH": python_path()} | memory_kept(device)
    wanted |= {"RAY_raylet_client_connect_timeout_milliseconds": "20", "RAY_raylet_client_num_connect_attempts": "500"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        # Another version of Ray may lack a name: `create`.
        unused: dict[str, Any] = dict.fromkeys(UNUSED, DEFAULT)
        # It would import a web server to see whether the dashboard's agent could use it.
        without = patch.object(utils, "get_dashboard_dependency_error", ImportError, create=True)
        with patch.multiple(Node, create=True, start_raylet=started_soon, **unused), without:
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def python_path() -> str:
    """Where this process finds modules: an objective may live in a file next to its recipe."""
    return os.pathsep.join([str(checkout.ROOT), *filter(None, sys.path)])


TRAVELS = ("NCCL_", "TORCH_NCCL_", "GLOO_", "HF_", "VLLM_", "CUDA_DEVICE_MAX_", "TOKENIZERS_")
"""Beginnings of the variables that reach the actors of other nodes, which else have the environment of their node."""
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")
"""Parts of names that do not travel: Ray prints the environment of actors in its logs."""


def travelling(environment: Mapping[str, str]) -> dict[str, str]:
    """The driver's variables that actors on other nodes get."""
    kept = [name for name in environment if name.startswith(TRAVELS) and not any(part in name for part in SECRET)]
    return {name: environment[name] for name in kept}


def learner_env(threads: int, device: Device) -> dict[str, str]:
    """Environment of a learner's process. Ray would give it one thread, and OpenMP threads that spin for long would
    starve the engine."""
    env = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "4000"}
    # DeepSpeed asks for a compiled function of an optimizer that is not used here, and torch then imports its compiler.
    return env | {"TORCHDYNAMO_DISABLE": "1"} if device == "cpu" else env


def without_functions(config: Config) -> Config:
    """The config as actors get it: data, rewards, judges, environment and filters stay on the driver.

    Raises ValueError for a setting that cannot be sent.
    """
    kinds = {"reward": _stays_on_driver, "env": _Elsewhere, "agent": _stays_on_driver}
    # Whether it learns from episodes decides how long a sample can be, also for a rank.
    kept = {name: None if getattr(config, name) is None else stand_in for name, stand_in in kinds.items()}
    config = replace(config, data=_stays_on_driver, eval_reward=None, filters=(), judges=(), **kept)
    for field in fields(config):
        value = getattr(config, field.name)
        try:
            cloudpickle.dumps(value)
        except Exception as error:  # whatever the value's own pickling raises
            raise ValueError(
                f"{field.name}={shortened(repr(value), 200)} cannot be sent to the engines and ranks "
                f"({type(error).__name__}: {shortened(str(error), 200)}): keep locks, files and clients out of it, "
                "or make them where they are used"
            ) from error
    return config


class _Elsewhere:
    """Stands for the driver's environment, and has no tools."""


def _stays_on_driver(*_: Any) -> Any:
    raise AssertionError("data and reward are called on the driver only")
