"""Do weights arrive, also while the engine samples, and how fast? Updates through the run's own cluster."""

import argparse
import asyncio
import os
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from echo_task import make_model
from gpu.setting import Result, base_config, middle, reached, started

from rl.config import TrainerConfig
from trainer.cluster.placement import place

MARK = "UNISON_GPU_CHECK"
"""The variable by which a phase knows its own processes."""


def update(args: argparse.Namespace, ranks: int = 0, *, aside: bool = False) -> Result:
    """Two verified updates, then more for as long as replies are being sampled; tokens say which weights made them.

    `ranks` have a GPU each and share the weights (ZeRO 3); 0: one rank on the engine's own GPU. `aside`: the engine
    receives while it samples. At the end the engine is killed while an update begins, and must be replaced.
    """
    cuda = args.device == "cuda"
    # Qwen2.5-7B with four of its layers: its embedding is larger than 1 GiB.
    shape = {"hidden": 3584, "inner": 18944, "layers": 4, "vocabulary": 152064}
    shape = shape if cuda else {"hidden": 256, "inner": 1024, "layers": 4, "vocabulary": 8192}
    model = make_model(Path(args.work) / "large", device=args.device, **shape)
    longest = 900 if cuda else 200
    config = base_config(args, "update", model, max_tokens=longest, max_model_len=1024, enforce_eager=True)
    rollout = replace(config.rollout, receive_while_sampling=aside)
    config = replace(config, rollout=rollout, dtype="bfloat16" if cuda else "float32", verify_every=0)
    if ranks:
        config = replace(config, share_gpu=False, trainer=TrainerConfig(ranks=ranks, zero_stage=3))
    placement = place(config, cuda=cuda)

    async def run() -> Result:
        async with started(config, placement) as (fleet, learner, rollouts):
            cluster = fleet.cluster
            reached(args, "engine and learner were ready")
            verified = [await learner.publish(version) for version in range(2)]
            reached(args, "two updates were verified")
            before = used_gib(cuda)
            sampling = [asyncio.create_task(rollouts.sample([3, 4, 5 + i], 2, seed=i)) for i in range(4)]
            moving = []
            while not all(task.done() for task in sampling):  # no reply fits between two of them
                moving.append(await learner.publish(learner.version + 1))
            replies = [reply for group in await asyncio.gather(*sampling) for reply in group]
            reached(args, f"{len(replies)} replies and {len(moving)} updates next to them were there")
            quiet = [await learner.publish(learner.version + 1) for _ in range(3)]
            last = (await rollouts.sample([3, 4, 5], 1, seed=0))[0]
            counts = await cluster.ask_engines(lambda e: e.counters())
            victim = process_of(os.environ[MARK], "VLLM::EngineCore" if cuda else "ray::EngineActor")
            updating, began = asyncio.create_task(learner.publish(learner.version + 1)), time.perf_counter()
            await asyncio.sleep(0.02)
            victim.kill()
            reached(args, "an engine was killed")
            report = await updating
            if not fleet.restarts:  # the update was faster
                report = await learner.publish(learner.version + 1)
            recovery = time.perf_counter() - began
            again = (await rollouts.sample([3, 4, 5], 1, seed=0))[0]
            return {
                "backend": placement.backend,
                "gib": verified[0].bytes / 2**30,
                "verified_s": [r.seconds for r in verified],
                "seconds": middle([r.seconds for r in quiet]),
                "gb_per_s": middle([r.bytes / 1e9 / r.seconds for r in quiet]),
                "pause_seconds": middle([r.pause_seconds for r in quiet]),
                "seconds while sampling": middle([r.seconds for r in moving]),
                "updates while sampling": len(moving),
                "versions in one reply, most": max(len(set(reply.versions)) for reply in replies),
                "memory before and after, GiB": (before, used_gib(cuda)),
                "aborted": counts[0]["aborted"],
                "seconds until a killed engine is back": recovery,
                "problems": problems(replies, last, counts[0])
                + ([] if report.verified and fleet.restarts == 1 else ["no engine was replaced, or not verified"])
                + ([] if set(again.versions) == {learner.version} else ["the new engine has old weights"]),
            }

    return asyncio.run(run())


def problems(replies: list[Any], last: Any, counts: dict[str, int]) -> list[str]:
    """What is wrong with the replies that were under way."""
    found = []
    if counts["aborted"]:
        found.append(f"{counts['aborted']} requests were aborted")
    if any(list(reply.versions) != sorted(reply.versions) for reply in replies):
        found.append("versions of a reply's tokens do not rise")
    if max(len(set(reply.versions)) for reply in replies) < 2:
        found.append("no reply spans an update, so none was under way")
    if set(last.versions) != {counts["version"]}:
        found.append(f"a reply after the updates carries {set(last.versions)}, the engine holds {counts['version']}")
    return found


def process_of(mark: str, name: str) -> psutil.Process:
    """The process of this name that carries the mark of this check in its environment."""
    for process in psutil.process_iter(["cmdline"]):
        with suppress(psutil.Error):  # another user's, or one that has ended
            command = " ".join(process.info["cmdline"] or [])
            if command.startswith(name) and process.environ().get(MARK) == mark:
                return process
    raise RuntimeError(f"no process {name} of this check")


def used_gib(cuda: bool) -> float:
    """Memory in use on the GPU by all processes."""
    if not cuda:
        return 0.0
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) / 1024
