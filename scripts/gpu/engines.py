"""Do engine and trainer agree on this device? One engine for each way to sample, each in a process of its own."""

import argparse
import asyncio
import multiprocessing
import traceback
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from echo_task import make_model
from gpu.setting import Result, base_config

from rl.batch import collate, take, trajectory
from rl.config import Config
from rl.parity.gap import gap
from rl.types import Batch, Prompt
from trainer.model.policy import load

LIMIT = 0.05
"""Nats of mean |d| that fp32 heads on both sides may show over a bf16 body."""
CONTROL = 3
"""The negative control's gap must be so many times that of processed log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One engine: how it differs from the settings of a run, and at which temperatures it samples."""

    head: str = "fp32"
    kind: str = "processed"
    eager: bool = True
    async_scheduling: bool = False
    temperatures: tuple[float, ...] = (1.0,)
    cut: dict[str, Any] = field(default_factory=dict)
    right: bool = True
    """Whether its log-probabilities should agree with the trainer's."""
    on_cpu: bool = False


VARIANTS = {
    "eager": Variant(temperatures=(1.0, 0.7), on_cpu=True),
    "compiled": Variant(eager=False, temperatures=(1.0, 0.7)),
    "async scheduling": Variant(eager=False, async_scheduling=True),
    "top_k, top_p": Variant(cut={"top_k": 50, "top_p": 0.9}, temperatures=(1.0, 0.7)),
    "min_p": Variant(cut={"min_p": 0.05}),
    "bf16 head": Variant(head="bf16", right=False),
    "raw": Variant(kind="raw", temperatures=(0.7,), right=False, on_cpu=True),
}


def engines(args: argparse.Namespace) -> Result:
    """The gap between each engine and the trainer, whose head is fp32; raw log-probabilities as a negative control."""
    cpu = args.device == "cpu"
    shape = {"hidden": 512, "inner": 1408, "layers": 12, "vocabulary": 32768}
    shape = {"hidden": 128, "inner": 256, "layers": 4, "vocabulary": 2048} if cpu else shape
    model = args.model or make_model(Path(args.work) / "peaky", nats=3.0, **shape)
    wanted = {name: v for name, v in VARIANTS.items() if v.on_cpu or not cpu}
    context = multiprocessing.get_context("spawn")
    children = {n: context.Process(target=sample_to_file, args=(args, n, model), name=n) for n in wanted}
    # On a GPU machine side by side, because a start takes most of the time; on a small machine one after the other.
    for child in children.values():
        child.start()
        if cpu:
            child.join()
    for child in children.values():
        child.join()
    rows, more, problems = [], {}, []
    policy = load(model, dtype=dtype(args), fp32_head=True, share_prompts=False).to(args.device).eval()
    for name, variant in wanted.items():
        found = _read(Path(args.work) / f"{name}.pt")
        if "error" in found:
            problems.append(f"{name}: {found['error']}")
            continue
        more |= {f"{name}: {what}": value for what, value in found["more"].items()}
        for t, batch in found["batches"].items():
            config = settings(args, variant, model)
            between = gap(trainer_logprobs(policy, batch, t, config, args.device), batch.rollout_logprobs, batch.mask)
            rows.append({"engine": name, "T": t} | {k: v for k, v in asdict(between).items() if k != "worst"})
            if variant.right and not rows[-1]["mean_abs"] < LIMIT:
                problems.append(f"{name} at T={t}: the log-probabilities differ by {rows[-1]['mean_abs']:.2g} nats")
    gaps = {(row["engine"], row["T"]): row["mean_abs"] for row in rows}
    raw, processed = gaps.get(("raw", 0.7), 0.0), gaps.get(("eager", 0.7), 0.0)
    if not raw > CONTROL * processed:
        problems.append(
            f"raw log-probabilities differ by {raw:.2g} nats, processed ones by {processed:.2g}: no control"
        )
    return {"model": args.model or shape, "rows": rows, **more, "problems": problems}


def settings(args: argparse.Namespace, variant: Variant, model: str) -> Config:
    """The config of a variant."""
    tokens = 24 if args.device == "cpu" else 128
    config = base_config(args, "engines", model, max_tokens=tokens, max_model_len=256, enforce_eager=variant.eager)
    rollout = replace(config.rollout, async_scheduling=variant.async_scheduling, **variant.cut)
    return replace(config, rollout=rollout, fp32_head=variant.head == "fp32", dtype=dtype(args))


def dtype(args: argparse.Namespace) -> str:
    """That of weights and of the model's body, on both sides."""
    return "bfloat16" if args.device == "cuda" else "float32"


def sample_to_file(args: argparse.Namespace, name: str, model: str) -> None:
    """In a process of its own: what one engine samples, or its error."""
    from gpu.fixed_cache import FixedCacheEngine

    variant = VARIANTS[name]
    config = settings(args, variant, model)
    overrides: dict[str, Any] = {"logprobs_mode": f"{variant.kind}_logprobs", "load_format": "auto"}

    async def sample() -> dict[str, Any]:
        how = {"device": args.device, "backend": "gloo" if args.device == "cpu" else "ipc", "model": model}
        engine = FixedCacheEngine(config, version=0, overrides=overrides, **how)
        try:
            await engine.start()
            g = torch.Generator().manual_seed(0)
            several = range(4 if args.device == "cpu" else 16)
            vocabulary = engine.llm.model_config.get_vocab_size()
            prompts = [torch.randint(3, vocabulary, (40 + i,), generator=g).tolist() for i in several]
            batches = {t: await batch(engine, prompts, t) for t in variant.temperatures}
            more: Result = {"model runner V2": engine.llm.vllm_config.use_v2_model_runner}
            return {"batches": batches, "more": more | (await questions(engine, prompts) if name == "eager" else {})}
        finally:
            await engine.close()

    try:
        found = asyncio.run(sample())
    except BaseException as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {str(error)[:800]}"}
    torch.save(found, Path(args.work) / f"{name}.pt")


async def batch(engine: Any, prompts: list[list[int]], t: float) -> Batch:
    """Eight replies to each prompt."""
    asked = (engine.sample(ids, 8, seed=1000 * i, temperature=t) for i, ids in enumerate(prompts))
    groups = enumerate(await asyncio.gather(*asked))
    pairs = [(Prompt(ordinal=i, token_ids=prompts[i], task={}), c) for i, group in groups for c in group]
    return collate([trajectory(prompt, c, 0.0, {}) for prompt, c in pairs])


async def questions(engine: Any, prompts: list[list[int]]) -> Result:
    """Seeds, cached prefixes, and the engine's other ways to compute the same log-probabilities."""
    prompt = [token for some in prompts[:3] for token in some]
    alone = [(await engine.sample(prompt, 1, seed=s))[0] for s in range(8)]
    together = await engine.sample(prompt, 64, seed=0)
    prefix = [int(_agree(a.token_ids, b.token_ids)) for a, b in zip(alone, together[:8], strict=True)]
    reply = alone[0].token_ids[:16]
    sampled = torch.tensor(alone[0].logprobs[:16])
    filled = torch.tensor(await engine.prefill(prompt, reply))
    scored = torch.tensor(await engine.score(prompt, reply))
    return {
        "tokens until a seed's reply differs between alone and among 64": prefix,
        "cached prompt tokens of a second request": together[-1].cached_prompt_tokens,
        "prefill against sampled, worst nats": float((filled - sampled).abs().max()),
        "score against sampled, worst nats": float((scored - sampled).abs().max()),
    }


def _agree(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def trainer_logprobs(policy: Any, batch: Batch, t: float, config: Config, device: str) -> torch.Tensor:
    """[B, T] in nats, on CPU: the policy's, with the cuts of the run (reported by the engine, else its own)."""
    trainer = torch.zeros(batch.mask.shape)
    for rows in torch.arange(len(batch.rewards)).split(16):
        part = take(batch, rows).to_device(torch.device(device))
        with torch.no_grad():
            got = policy(part.input_ids, part.mask, t, config.rollout.truncation, part.support).logprobs.cpu()
        trainer[rows, : got.shape[1]] = got
    return trainer


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {"error": "its process ended without a result"}
    return torch.load(file, weights_only=False)
