"""What does a learner save, for other ranks to continue exactly? Full fp32 tensors, by name."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.learner.weights import deepspeed_fields, layers

MOMENTS = ("exp_avg", "exp_avg_sq")
COUNTERS, RANDOM = "counters.json", "random.safetensors"


def save(engine: Any, folder: Path, *, coefs: dict[str, float], base: str) -> None:
    """Write a learner between two steps: master weights, Adam's moments, counters and generators; rank 0 writes.

    Weights that are not trained are left out; `base` is their digest. Only the generators depend on the number of
    ranks (one per rank), and nothing depends on the ZeRO stage. A collective over all ranks. Raises OSError.
    """
    assert engine.global_steps, "before its first step an optimizer has no state"
    parameters, rank = _trained(engine), dist.get_rank()
    if engine.zero_optimization_stage() in (1, 2):
        _link(engine, list(parameters.values()))
    failed: Exception | None = None
    for index, names in enumerate(layers(list(parameters))):
        # Layer by layer: all layers at once would need twelve bytes per parameter of the whole model on rank 0.
        tensors: dict[str, Tensor] = {}
        for name in names:
            full = _full(engine, parameters[name])
            if rank == 0:
                # Cloned: a view would write its whole buffer into the file.
                tensors |= {f"{kind}/{name}": tensor.detach().cpu().clone() for kind, tensor in full.items()}
        failed = failed or _written(tensors, folder / f"layer-{index:04d}.safetensors", rank)
    generators: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(generators, _generators())
    states = {f"{kind}/{i}": state for i, mine in enumerate(generators) for kind, state in mine.items()}
    failed = failed or _written(states, folder / RANDOM, rank)
    if failed:
        # Only now: a rank that left early would leave the others waiting in a collective.
        raise OSError(f"the learner's state could not be written to {folder}: {failed}") from failed
    if rank == 0:
        counters = {"optimizer_steps": int(engine.global_steps), "coefficients": coefs, "base": base}
        (folder / COUNTERS).write_text(json.dumps(counters))


def _trained(engine: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def _full(engine: Any, parameter: nn.Parameter) -> dict[str, Any]:
    """A parameter's master and moments by kind. Collective."""
    if engine.zero_optimization_stage() == 0:
        return {"weights": parameter} | {m: engine.optimizer.state[parameter][m] for m in MOMENTS}
    full = {"weights": safe_get_full_fp32_param(parameter)}
    return full | {m: safe_get_full_optimizer_state(parameter, m) for m in MOMENTS}


def _adam(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def _written(tensors: dict[str, Tensor], path: Path, rank: int) -> Exception | None:
    """Write and flush on rank 0. Returns the error, if any."""
    if rank:
        return None
    try:
        save_file(tensors, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        return error
    return None


def load(engine: Any, folder: Path, *, base: str) -> dict[str, float]:
    """Give a fresh engine the saved state; every rank reads the same files. Returns the coefficients.

    Raises ValueError, before anything changes, when the files are of another model.
    """
    parameters, stage = _trained(engine), engine.zero_optimization_stage()
    check_shapes(
        folder, {name: tuple(deepspeed_fields(p).ds_shape if stage == 3 else p.shape) for name, p in parameters.items()}
    )
    counters = json.loads((folder / COUNTERS).read_text())
    if counters.get("base", "") != base:
        raise ValueError(f"the adapters in {folder} were trained on other weights: resume with the model of that run")
    steps = int(counters["optimizer_steps"])
    _make_optimizer_state(engine, list(parameters.values()), steps)
    put = (_put, _put_partitioned, _put_partitioned, _put_sharded)[stage]
    with torch.no_grad():
        for kind, name, tensor in _tensors(folder):
            put(engine, parameters[name], kind, tensor)
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
    _set_steps(engine, steps)
    _restore_generators(folder, dist.get_rank())
    return counters["coefficients"]


def _put(engine: Any, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    target = parameter if kind == "weights" else engine.optimizer.state[parameter][kind]
    target.copy_(value)


def _put_partitioned(engine: Any, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    if kind == "weights":
        safe_set_full_fp32_param(parameter, value.to(engine.device))
    else:
        safe_set_full_optimizer_state(parameter, value.to(engine.device), kind)


def _put_sharded(engine: Any, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    # DeepSpeed's setter of full tensors reads past the end of those that no number of ranks divides.
    shard = _shard(value.to(engine.device), deepspeed_fields(parameter).ds_tensor.numel(), dist.get_rank())
    if kind != "weights":
        safe_set_local_optimizer_state(parameter, shard, kind)
        return
    safe_set_local_fp32_param(parameter, shard)
    # The model computes with another copy.
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)


def _make_optimizer_state(engine: Any, parameters: list[nn.Parameter], steps: int) -> None:
    """Make the optimizer state that torch's Adam makes in its first step; `load` fills it."""
    adam, stage = _adam(engine), engine.zero_optimization_stage()
    flats = engine.optimizer.fp32_partitioned_groups_flat if stage == 3 else [g["params"][0] for g in adam.param_groups]
    for flat in parameters if stage == 0 else flats:
        adam.state[flat] = {"step": torch.tensor(float(steps), device=flat.device)}
        adam.state[flat] |= {moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS}
    if stage in (1, 2):
        _link(engine, parameters)


def _link(engine: Any, parameters: list[nn.Parameter]) -> None:
    """Link each parameter to its moments in DeepSpeed's buffers.

    DeepSpeed (0.19) links them once, when Adam has made the moments of the first parameter group only, and misses the
    moments of all other groups.
    """
    adam = engine.optimizer.optimizer
    for parameter in parameters:
        # None: no part of it is in this rank's partition.
        mapping = deepspeed_fields(parameter)._hp_mapping
        if mapping is not None:
            flat = adam.param_groups[mapping.param_group_index]["params"][0]
            lazy_init_hp_params_optimizer_state([parameter], flat, adam.state)


def _set_steps(engine: Any, steps: int) -> None:
    """Set the position on the current config's schedule: a resumed run may be longer, or have another peak."""
    engine.global_steps, schedule = steps, engine.lr_scheduler
    rates = [base * factor(steps) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    schedule.load_state_dict(schedule.state_dict() | {"last_epoch": steps, "_step_count": steps + 1, "_last_lr": rates})
    for group, rate in zip(_adam(engine).param_groups, rates, strict=True):
        group["lr"] = rate


def check_shapes(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    found: set[str] = set()
    for path in _layer_files(folder):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118, it is no dict
                name, shape = key.partition("/")[2], tuple(file.get_slice(key).get_shape())
                if shapes.get(name) != shape:
                    raise ValueError(
                        f"{path} is of another model: it holds a {name!r} of shape {shape}, where this model has "
                        f"{shapes.get(name, 'nothing')}. Resume with the recipe and the model that wrote it"
                    )
                found.add(key)
    missing = {f"{kind}/{name}" for kind in ("weights", *MOMENTS) for name in shapes} - found
    if missing:
        raise ValueError(
            f"{folder} is of another model: it has no {min(missing)!r}, nor {len(missing) - 1} others. Resume with the "
            "recipe and the model that wrote it"
        )


def _tensors(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    """Every tensor as (kind, name, tensor), in the same order on every rank."""
    for path in _layer_files(folder):
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                kind, _, name = key.partition("/")
                yield kind, name, file.get_tensor(key)


def _layer_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("layer-*.safetensors"))


def _shard(full: Tensor, size: int, rank: int) -> Tensor:
    """A rank's part of a flattened tensor, padded with zeros like DeepSpeed's."""
    part = full.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(part, (0, size - part.numel()))


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_generators(folder: Path, rank: int) -> None:
    """Restore this rank's generators; a rank that did not exist when the state was saved keeps its seed."""
    with safe_open(folder / RANDOM, framework="pt") as file:
        saved = set(file.keys())
        if f"cpu/{rank}" in saved:
            torch.set_rng_state(file.get_tensor(f"cpu/{rank}"))
        if f"cuda/{rank}" in saved and torch.cuda.is_available():
            torch.cuda.set_rng_state(file.get_tensor(f"cuda/{rank}"))
