"""What do all phases of the GPU check share? The run's settings, and how a measurement is summarised."""

import argparse
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from echo_task import digits, share_of_echoes

from rl.config import Config, Deadlines, RolloutConfig, TrackingConfig
from trainer.cluster.cluster import Cluster
from trainer.cluster.fleet import Fleet
from trainer.cluster.placement import Placement
from trainer.cluster.remote import RemoteLearner, RemoteRollouts

Result = dict[str, Any]
BEGAN = time.perf_counter()
"""When this phase's process imported its settings, a moment after its start."""


def reached(args: argparse.Namespace, done: str) -> None:
    """Print what a phase has done, and keep it for the error of a phase that comes to its time limit."""
    done = f"{done} after {time.perf_counter() - BEGAN:.0f} s"
    print(f"  {args.phase}: {done}", flush=True)
    Path(args.result).with_suffix(".reached").write_text(done)


def middle(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def base_config(args: argparse.Namespace, name: str, model: str, **rollout: Any) -> Config:
    """The settings that all phases share; not every phase uses data and reward."""
    # Side by side, engines would measure each other's memory, so they get a cache of a fixed size.
    engine = "gpu.fixed_cache:FixedCacheEngine" if args.side_by_side else RolloutConfig().engine_class
    rollouts = RolloutConfig(gpu_memory_utilization=0.2, kv_cache_gib=0.25, engine_class=engine, **rollout)
    limit = 60 * args.patience
    deadlines = Deadlines(start_s=200 * args.patience, sample_s=limit, step_s=limit, sync_s=limit)
    where = {"device": args.device, "share_gpu": args.device == "cuda", "output_dir": args.keep or f"{args.work}/runs"}
    config = Config(name=name, model=model, data=digits, reward=share_of_echoes, rollout=rollouts, **where)
    return replace(config, tracking=TrackingConfig(wandb="off"), save_final=False, deadlines=deadlines)


@asynccontextmanager
async def started(config: Config, placement: Placement) -> AsyncIterator[tuple[Fleet, RemoteLearner, RemoteRollouts]]:
    """Engines and ranks that have started, before the first update. They end with the block."""
    cluster = Cluster(config, placement)
    try:
        cluster.boot()
        await cluster.start()
        fleet = Fleet(cluster)
        yield fleet, RemoteLearner(cluster, probe=list(range(3, 11)), fleet=fleet), RemoteRollouts(cluster, fleet)
    finally:
        await cluster.aclose()


def seconds(run: Callable[[], Any], device: str, times: int = 5) -> float:
    """Median seconds of a call, after one that does not count; on a GPU with its work finished."""
    found = []
    for _ in range(times + 1):
        _finish(device)
        began = time.perf_counter()
        run()
        _finish(device)
        found.append(time.perf_counter() - began)
    return median(found[1:])


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error: |got - want| / |want|, as vectors."""
    return float((got.double() - want.double()).norm() / want.double().norm())
