"""How near is an engine of a run to bare vLLM? The table "Rollouts" of docs/performance.md.

    python scripts/bench/rollouts.py --rounds 5 --out docs/data/rollouts.json

Bare vLLM is `LLM.generate` with the engine's own arguments; the other side is a run's engine in its Ray actor, asked as
the loop asks. Both hold SmolLM2-135M in fp32, and take turns: a round of one, then the same round of the other, with
the same prompts, seeds, lengths and log-probabilities. CPU only."""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rl.config import Config, RolloutConfig
from rl.types import Data
from rollout.settings import engine_args, engine_env, sampling_settings
from trainer import machine
from trainer.cluster.cluster import Cluster
from trainer.cluster.placement import place
from trainer.cluster.remote import RemoteRollouts

ROOT = Path(__file__).resolve().parents[2]
JOBS = {"heavy-tailed": 256, "equal": 64}
"""Tokens of the longest reply. Equal lengths are all as long."""
PROMPTS, GROUP, PROMPT = 4, 8, 24
SIDES = ("bare", "engine")
Asked = tuple[list[int], int, int]
"""A prompt, the seed of its reply, and the tokens of the reply."""
Play = Callable[[list[Asked]], int]
"""Samples all replies of a round; returns how many tokens they have."""


def requests(job: str, turn: int) -> list[Asked]:
    """What a round asks for."""
    from heavy_tailed import length

    drawn, longest = random.Random(f"{job} {turn}"), JOBS[job]
    prompts = [[drawn.randrange(1000, 40000) for _ in range(PROMPT)] for _ in range(PROMPTS)]
    seeds = [1000 * turn + i for i in range(PROMPTS * GROUP)]
    return [
        (prompts[i // GROUP], seed, length(seed, longest) if job == "heavy-tailed" else longest)
        for i, seed in enumerate(seeds)
    ]


CONFIG = Config(
    name="rollouts",
    model=str(ROOT / "models" / "smollm2-135m"),
    data=lambda: Data(train=[]),
    reward=lambda reply: 0.0,
    dtype="float32",
    device="cpu",
    rollout=RolloutConfig(
        max_tokens=256, max_model_len=288, max_num_seqs=32, kv_cache_gib=1.0, engine_class="heavy_tailed:Exact"
    ),
)


@contextmanager
def bare() -> Iterator[Play]:
    """`LLM.generate`, in this process."""
    from vllm import LLM, SamplingParams, TokensPrompt

    import rollout.worker  # noqa: F401  # its shorter blocks

    args = engine_args(CONFIG, device="cpu", backend="gloo", model=CONFIG.model) | {"load_format": "auto"}
    for name in ("worker_extension_cls", "weight_transfer_config"):
        args.pop(name)
    llm, common = LLM(**args), sampling_settings(CONFIG, []) | {"ignore_eos": True, "logprobs": 0}

    def play(asked: list[Asked]) -> int:
        params = [SamplingParams(**common | {"max_tokens": n, "seed": seed}) for _, seed, n in asked]
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt, _, _ in asked]
        return sum(len(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False))

    yield play


@contextmanager
def product() -> Iterator[Play]:
    """The engine of a run, in its Ray actor, asked as the loop asks."""
    runner = asyncio.Runner()
    cluster = Cluster(CONFIG, replace(place(CONFIG, cuda=False, gpus=0), learners=0))

    async def start() -> RemoteRollouts:
        cluster.boot()
        await cluster.start()
        return RemoteRollouts(cluster)

    async def all_of(asked: list[Asked]) -> int:
        made = await asyncio.gather(*(rollouts.sample(p, 1, seed=seed, max_tokens=n) for p, seed, n in asked))
        return sum(len(group[0].token_ids) for group in made)

    try:
        rollouts = runner.run(start())
        yield lambda asked: runner.run(all_of(asked))
    finally:
        runner.run(cluster.aclose())


def serve(side: str) -> None:
    """One side: for each line of stdin, a job and a turn, play the round and print what it took."""
    with bare() if side == "bare" else product() as play:
        print("ready", flush=True)
        for line in sys.stdin:
            job, turn = line.rsplit(maxsplit=1)
            asked = requests(job, int(turn))
            began = time.perf_counter()
            tokens = play(asked)
            print(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - began}), flush=True)


class Side:
    """A process that plays rounds of one side."""

    def __init__(self, side: str) -> None:
        command = [sys.executable, __file__, "--side", side]
        # Before vLLM is imported; the actor of the other side gets the same.
        env = os.environ | (engine_env(device="cpu", backend="gloo", threads=machine.cores()) if side == "bare" else {})
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(("ready", "{")):
                return line.strip()
        raise SystemExit(f"a side ended with code {self.process.wait()}")

    def play(self, job: str, turn: int) -> dict[str, float]:
        assert self.process.stdin
        print(job, turn, file=self.process.stdin, flush=True)
        return json.loads(self._line())


def main() -> None:
    """Play the rounds in turns, and print the medians and each pair's ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds of each job on each side, after one that is not counted"
    )
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=JOBS, help="default: both")
    parser.add_argument("--out", type=Path, help="JSON file for every round")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        serve(asked.side)
        return
    sides = {side: Side(side) for side in SIDES}
    rows = []
    print("| replies | bare, tokens/s | engine, tokens/s | engine / bare (smallest to largest) |")
    print("|---|---|---|---|")
    for job in asked.jobs:
        for turn in range(asked.rounds + 1):
            order = SIDES if turn % 2 else SIDES[::-1]
            pair = {side: sides[side].play(job, turn) for side in order}
            assert len({r["tokens"] for r in pair.values()}) == 1
            if turn:
                rows.append({"job": job, "turn": turn} | pair)
        here = [row for row in rows if row["job"] == job]
        speed = {side: [row[side]["tokens"] / row[side]["seconds"] for row in here] for side in SIDES}
        ratios = [a / b for a, b in zip(speed["engine"], speed["bare"], strict=True)]
        cells = [job, *(f"{statistics.median(speed[side]):.0f}" for side in SIDES)]
        cells += [f"{statistics.median(ratios):.0%} ({min(ratios):.0%} to {max(ratios):.0%})"]
        print("| " + " | ".join(cells) + " |", flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(rows, indent=1) + "\n")
    for side in sides.values():
        side.process.communicate()


if __name__ == "__main__":
    main()
