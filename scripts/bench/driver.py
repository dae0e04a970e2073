"""What does a step cost its driver? Transport, trajectories, metrics and tensors, in seconds per million tokens.

    python scripts/bench/driver.py --samples 4096 --tokens 2048 --out docs/data/driver.json

A Ray actor holds one group's completions and returns them as an engine does, once for each group. The driver makes
trajectories, the step's metrics and its batch, and hands that to an actor, which cuts it into micro-batches. Nothing
is sampled or trained."""

import argparse
import json
import random
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch

from rl.batch import collate, micro_batches, take, trajectory
from rl.loop.step_metrics import batch_metrics
from rl.types import Batch, Completion, Prompt, Trajectory
from trainer.cluster.process_env import ray_environment

PROMPT, GROUP, BUDGET = 128, 8, 8192
SECONDS: dict[str, float] = defaultdict(float)
CPU: dict[str, float] = defaultdict(float)


@ray.remote
class Worker:
    """Stands for an engine, and for a learner's rank."""

    def make(self, tokens: int) -> None:
        drawn = random.Random(0)
        self.completions = [
            Completion(
                token_ids=[drawn.randrange(49152) for _ in range(tokens)],
                logprobs=torch.log_softmax(torch.randn(tokens), 0).tolist(),
                versions=[7] * tokens,
                finish_reason="length",
            )
            for _ in range(GROUP)
        ]

    def give(self) -> list[Completion]:
        return self.completions

    def cut(self, batch: Batch) -> float:
        """Seconds to cut a step into its micro-batches."""
        began = time.perf_counter()
        every = torch.arange(len(batch.rewards))
        (parts,) = micro_batches(batch, every, ranks=1, budget=BUDGET, share_prompts=True)
        for rows in parts:
            take(batch, rows)
        return time.perf_counter() - began


@contextmanager
def timed(part: str) -> Iterator[None]:
    began, cpu = time.perf_counter(), time.process_time()
    yield
    SECONDS[part] += time.perf_counter() - began
    CPU[part] += time.process_time() - cpu


def resident() -> float:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    """Measure one step, and print a row for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4096, help="replies of the step (default: 4096)")
    parser.add_argument(
        "--tokens", type=int, default=2048, help=f"of each, {PROMPT} of them the prompt's (default: 2048)"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    asked = parser.parse_args()
    with ray_environment("cpu"):  # as a run starts it
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error", num_cpus=2)
    worker: Any = Worker.remote()
    ray.get(worker.make.remote(asked.tokens - PROMPT))
    ray.get(worker.give.remote())
    before = resident()
    trajectories: list[Trajectory] = []
    for group in range(asked.samples // GROUP):
        with timed("transport of replies"):
            completions = ray.get(worker.give.remote())
        prompt = Prompt(ordinal=group, token_ids=[*range(1, PROMPT + 1)], task={})
        with timed("trajectories"):
            trajectories += [trajectory(prompt, c, float(i % 2), {}) for i, c in enumerate(completions)]
    del completions
    held = resident() - before
    with timed("metrics"):
        batch_metrics(trajectories, 7, GROUP)
    with timed("tensors"):
        batch = collate(trajectories)
    with timed("transport of the batch"):
        cut = ray.get(worker.cut.remote(batch))
    SECONDS["transport of the batch"] -= cut
    ray.shutdown()
    million = asked.samples * asked.tokens / 1e6
    SECONDS["driver, all"], CPU["driver, all"] = sum(SECONDS.values()), sum(CPU.values())
    SECONDS["rank: take, all micro-batches"] = cut
    print("| part | s | s per million tokens | CPU s |\n|---|---|---|---|")
    for part, seconds in SECONDS.items():
        print(f"| {part} | {seconds:.2f} | {seconds / million:.3f} | {CPU[part]:.2f} |")
    figures = SECONDS | {"bytes_per_token": held / million / 1e6, "cpu_per_million": CPU["driver, all"] / million}
    figures |= {"samples": asked.samples, "tokens": asked.tokens}
    print(f"\n{figures['bytes_per_token']:.0f} bytes a token stay on the driver.")
    if asked.out:
        asked.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
