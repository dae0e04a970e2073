"""Do engine and learner take turns on the GPU? Memory and seconds of each phase, and parity afterwards."""

import argparse
import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from echo_task import make_model
from gpu.setting import Result, base_config, reached, started
from gpu.update import used_gib

from rl.batch import collate, trajectory
from rl.config import TrainerConfig
from rl.types import Prompt
from trainer.cluster.placement import place

STEPS = 3


def sleep(args: argparse.Namespace) -> Result:
    """`STEPS` of sample, sleep, learn, update and wake; every update is verified by digests and by a probe."""
    cuda = args.device == "cuda"
    shape = {"hidden": 1536, "inner": 8960, "layers": 28, "vocabulary": 151936}  # Qwen2.5-1.5B
    shape = shape if cuda else {"hidden": 128, "inner": 256, "layers": 2, "vocabulary": 512}
    model = make_model(Path(args.work) / "turns", device=args.device, **shape)
    config = base_config(args, "sleep", model, max_tokens=32, max_model_len=256, enforce_eager=True)
    config = replace(
        config,
        dtype="bfloat16" if cuda else "float32",
        verify_every=1,
        trainer=TrainerConfig(lr=1e-5, zero_stage=2),
        rollout=replace(config.rollout, sleep=True, gpu_memory_utilization=0.7),
    )
    placement = place(config, cuda=cuda)

    async def run() -> Result:
        rows = list[dict[str, Any]]()
        async with started(config, placement) as (fleet, learner, rollouts):
            cluster = fleet.cluster
            asleep = used_gib(cuda)
            reached(args, "the learner was ready, and the engine asleep")
            await learner.publish(0)
            reached(args, "the engine had its weights, awake")
            for step in range(1, STEPS + 1):
                row: dict[str, Any] = {"step": step, "sampling_gib": used_gib(cuda)}
                waiting = asyncio.create_task(rollouts.sample([3, 4, 5, 6], 2, seed=99))
                groups = await asyncio.gather(*(rollouts.sample([3, 4, 5 + i], 4, seed=i) for i in range(8)))
                prompts = [Prompt(ordinal=i, token_ids=[3, 4, 5 + i], task={}) for i in range(8)]
                pairs = [(p, reply) for p, group in zip(prompts, groups, strict=True) for reply in group]
                batch = collate([trajectory(p, reply, float(i % 2), {}) for i, (p, reply) in enumerate(pairs)])
                gap = (await cluster.ask_learners(lambda rank, batch=batch: rank.logprobs(batch)))[0]
                row["mean_abs"] = float((gap - batch.rollout_logprobs)[batch.mask].abs().mean())
                began = time.perf_counter()
                learning = asyncio.create_task(learner.step(batch))
                row["most_while_learning_gib"] = await _most(learning, cuda)
                learned = time.perf_counter()
                reached(args, f"step {step} was learned")
                report = await learner.publish(step)
                row |= {"learn_s": learned - began, "update_and_wake_s": time.perf_counter() - learned}
                row["stood_still_s"] = report.pause_seconds
                await waiting
                rows.append(row)
            counts = (await cluster.ask_engines(lambda e: e.counters()))[0]
            return {
                "backend": placement.backend,
                "gib_at_start_asleep": asleep,
                "rows": rows,
                "aborted": counts["aborted"],
                "problems": ([] if counts["aborted"] == 0 else ["requests were aborted"])
                + ([] if not fleet.causes else fleet.causes)
                + [f"step {r['step']}: engine and trainer differ" for r in rows if not r["mean_abs"] < 0.05],
            }

    return asyncio.run(run())


async def _most(task: "asyncio.Task[Any]", cuda: bool) -> float:
    """Await a task; the most memory in use meanwhile, in GiB."""
    most = 0.0
    while not task.done():
        most = max(most, used_gib(cuda))
        await asyncio.wait([task], timeout=0.1)
    task.result()
    return most
