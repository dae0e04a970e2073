"""What the processes of a run start with: environment variables, and a config that can be sent to actors."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from ray import cloudpickle

from rl.config import Config
from rl.typed import shortened
from trainer.cluster.placement import Device


@contextmanager
def ray_environment() -> Iterator[None]:
    """Settings of Ray while it starts: no warnings about defaults that change, no usage reports, workers at normal
    priority (its default of nice 15 starves them next to any other process), and no workers started for tasks."""
    wanted = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    wanted["RAY_prestart_worker_first_driver"] = "0"
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


TRAVELS = ("NCCL_", "TORCH_NCCL_", "GLOO_", "HF_", "VLLM_", "CUDA_DEVICE_MAX_", "TOKENIZERS_")
"""Beginnings of the variables that reach the actors of other nodes, which else have the environment of their node."""
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")
"""Parts of names that do not travel: Ray prints the environment of actors in its logs."""


def travelling(environment: Mapping[str, str]) -> dict[str, str]:
    """The driver's variables that actors on other nodes get."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(TRAVELS) and not any(part in name for part in SECRET)
    }


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
