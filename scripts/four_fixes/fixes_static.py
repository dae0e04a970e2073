"""The gap between trainer and engine across one weight update; part A of scripts/four_fixes/four_fixes.py."""

import asyncio
import importlib
import json
import math
import time
from collections.abc import Coroutine
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rl.batch import collate, trajectory
from rl.config import Config, RolloutConfig
from rl.objectives import GRPO, GSPO
from rl.parity.gap import Gap, clipped_by_noise, clustered_error, gap
from rl.types import Data, Example, Prompt, Trajectory

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "models" / "smollm2-135m")
T = 0.7
SAMPLES = 4
"""Replies to each prompt: so many during the update, and again so many after it."""
UPDATE_AT = 8
"""About how many tokens every running request has when the update starts."""
CHANGE = 0.02
"""The update multiplies every weight by a random factor between 1 - CHANGE and 1 + CHANGE, like the doctor's update."""
LIMIT_S = 300.0
"""Seconds after which the engine counts as stalled."""
OBJECTIVES = {"gspo": GSPO(), "grpo": GRPO()}
CONFIG = Config(
    name="four_fixes",
    model=MODEL,
    data=lambda: Data(train=[]),
    reward=lambda reply: 0.0,
    dtype="float32",
    temperature=T,
    rollout=RolloutConfig(max_tokens=32, max_model_len=128, kv_cache_gib=0.5),
)

Number = tuple[float, float]
"""A value and its standard error."""


class Channel:
    """The sender's control calls, made from its thread into the engine's event loop."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.loop = engine, asyncio.get_running_loop()
        self.version = 1

    def _wait(self, call: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(call, self.loop).result(120)

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        self._wait(self.engine.init_weight_transfer_engine(info))

    def stage_weights(self, version: int) -> None:
        self._wait(self.engine.stage_weights(version))

    def start_weight_update(self) -> None:
        self._wait(self.engine.start_weight_update())

    def update_weights(self, info: dict[str, Any]) -> None:
        self._wait(self.engine.update_weights(info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._wait(self.engine.finish_weight_update(self.version))


async def open_channel(engine: Any, policy: Any) -> Any:
    """A sender of this policy's weights to the engine."""
    from rollout.weights.sender import open_sender
    from trainer.learner.weights import LearnerWeights

    return await asyncio.to_thread(
        open_sender,
        "gloo",
        weights=LearnerWeights(policy.hf, sharded=False),
        expected=await engine.expected_weights(),
        client=Channel(engine),
        rank=0,
        address="127.0.0.1",
        world_size=2,
        timeout_s=120,
    )


async def sample(engine: Any, prompts: list[Prompt], seed: int, max_tokens: int | None = None) -> list[Trajectory]:
    """Replies to all prompts at once."""
    groups = await asyncio.gather(
        *(engine.sample(p.token_ids, SAMPLES, seed + 100 * p.ordinal, max_tokens=max_tokens) for p in prompts)
    )
    return [trajectory(p, c, 0.0, {}) for p, group in zip(prompts, groups, strict=True) for c in group]


async def across_an_update(target: str, new: Any, prompts: list[Prompt]) -> tuple[list[Trajectory], ...]:
    """Replies that are running during an update, and replies to the same prompts started after it."""
    module, name = target.split(":")
    make = getattr(importlib.import_module(module), name)
    engine = make(CONFIG, device="cpu", backend="gloo", model=MODEL, version=0, overrides={"load_format": "auto"})
    await engine.start()
    try:
        sender = await open_channel(engine, new)
        for seed in (8000, 9000):
            # Only the second round is timed: the first includes warm-up.
            began = time.perf_counter()
            await sample(engine, prompts, seed, UPDATE_AT)
        wait = time.perf_counter() - began
        running = asyncio.create_task(sample(engine, prompts, 0))
        await asyncio.sleep(wait)
        await asyncio.to_thread(sender.send_weights)
        return await running, await sample(engine, prompts, 1000)
    finally:
        await engine.close()


def static(engine: str, old: Any, new: Any, prompts: list[Prompt]) -> dict[str, Any]:
    """One row of the table. d = trainer - rollout in nats, each token under the weights of its own version."""
    during, after = asyncio.run(asyncio.wait_for(across_an_update(engine, new, prompts), LIMIT_S))
    rows = [t for t in [*during, *after] if any(t.mask)]
    batch = collate(rows)
    with torch.no_grad():
        by_version = {version: p(batch.input_ids, batch.mask, T) for version, p in ((0, old), (1, new))}
    first = batch.versions == 0
    trainer = torch.where(first, by_version[0].logprobs, by_version[1].logprobs)
    entropy = torch.where(first, by_version[0].entropy, by_version[1].entropy)
    d = (trainer - batch.rollout_logprobs).double()
    # After the switch a running sequence uses keys and values of the old weights, by design: counted separately.
    mixed = batch.mask & ~first & (batch.mask & first).any(dim=1, keepdim=True)
    whole = batch.mask & ~mixed
    late = whole & ~first
    g = gap(trainer, batch.rollout_logprobs, whole)
    clip = {n: clipped_by_noise(o, replace(batch, mask=whole), trainer) for n, o in OBJECTIVES.items()}
    aborted = sum(t.finish_reason == "abort" for t in [*during, *after]) / len([*during, *after])
    numbers: dict[str, Number] = {
        "mean_d": (-g.k1, g.k1_se),
        "mean_abs": (g.mean_abs, clustered_error(d.abs(), whole)),
        "k3": (g.k3, g.k3_se),
        "k3_after": _k3(gap(trainer, batch.rollout_logprobs, late)),
        "entropy": (float(entropy[whole].mean()), clustered_error(entropy, whole)),
        "aborted": (aborted, math.sqrt(aborted * (1 - aborted) / len([*during, *after]))),
    }
    if mixed.any():
        numbers["k3_mixed"] = _k3(gap(trainer, batch.rollout_logprobs, mixed))
    return {
        "tokens": g.tokens,
        "mixed_tokens": int(mixed.sum()),
        "numbers": numbers,
        "clipped": {n: {"tokens": c.tokens, "sequences": c.sequences} for n, c in clip.items() if c},
        "gap": asdict(g),
        "update_moved": float((by_version[1].logprobs - by_version[0].logprobs)[late].abs().mean()),
    }


def _k3(g: Gap) -> Number:
    return g.k3, g.k3_se


def prompts_and_policies() -> tuple[list[Prompt], Any, Any]:
    """The prompts of the V0 reference as chat messages, the trainer before the update, and after it."""
    from rl.tokens import Rendering
    from trainer.data.encode import Encoder
    from trainer.model.policy import load
    from trainer.prompts import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    items = json.loads((ROOT / "tests" / "data" / "vllm_v0_fp32.json").read_text())["items"]
    texts = dict.fromkeys(tokenizer.decode(item["prompt_token_ids"]) for item in items)
    examples = [Example(prompt=[{"role": "user", "content": text}]) for text in texts]
    old, new = (load(MODEL, dtype="float32", fp32_head=True, share_prompts=True) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1 + CHANGE * (2 * torch.rand(parameter.shape, generator=generator) - 1))
    encoder = Encoder(
        tokenizer=tokenizer, config=CONFIG, rendering=Rendering(template=CONFIG.chat_template_kwargs), where="prompts"
    )
    return encoder.all(examples), old, new
