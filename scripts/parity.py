"""Does the engine say what the trainer would? The tables of docs/parity.md, made anew; about 6 minutes on two cores.

python scripts/parity.py [--out docs/parity.json]
"""

import argparse
import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rl.batch import collate, trajectory
from rl.config import Config, RolloutConfig
from rl.types import Batch, Data, Prompt
from rollout.settings import engine_env

ROOT = Path(__file__).resolve().parent.parent
MODEL = str(ROOT / "models" / "smollm2-135m")
ITEMS = json.loads((ROOT / "tests" / "data" / "vllm_v0_fp32.json").read_text())["items"]
CONFIG = Config(
    name="parity",
    model=MODEL,
    data=lambda: Data(train=[]),
    reward=lambda reply: 0.0,
    dtype="float32",
    rollout=RolloutConfig(max_tokens=24, max_model_len=192, kv_cache_gib=0.5),
)


def statistics(d: torch.Tensor) -> dict[str, float]:
    """Of d = trainer - rollout [N] in nats: sizes, KL estimators with standard errors, effective sample size."""
    n = d.numel()
    k3 = d.exp() - d - 1
    ratio = d.exp()
    return {
        "tokens": n,
        "mean_abs": float(d.abs().mean()),
        "max_abs": float(d.abs().max()),
        "k1": float(-d.mean()),
        "k1_se": float(d.std() / n**0.5),
        "k3": float(k3.mean()),
        "k3_se": float(k3.std() / n**0.5),
        "ess": float(ratio.mean() ** 2 / (ratio**2).mean()),
    }


async def engine_says(config: Config, ask: Any, **overrides: Any) -> Any:
    """Start one engine, ask it, end it."""
    from rollout.engine import Engine

    engine = Engine(config, device="cpu", backend="gloo", model=MODEL, overrides=overrides)
    await engine.start()
    try:
        return await ask(engine)
    finally:
        await engine.close()


async def against_v0(engine: Any) -> dict[str, dict[str, float]]:
    """V1's log-probabilities of V0's own tokens, by V0's setting."""
    found: dict[str, list[float]] = {}
    for item in ITEMS:
        sampling = {k: item[k] for k in ("temperature", "top_p", "top_k") if item.get(k) is not None}
        said = await engine.score(item["prompt_token_ids"], item["token_ids"], **sampling)
        found.setdefault(item["setting"], []).extend(a - b for a, b in zip(said, item["logprobs"], strict=True))
    return {setting: statistics(torch.tensor(d, dtype=torch.float64)) for setting, d in found.items()}


async def sampled(engine: Any) -> dict[float, Batch]:
    """Sequences that the engine samples, by temperature."""
    batches = {}
    for temperature in (1.0, 0.7):
        prompts = [Prompt(ordinal=n, token_ids=item["prompt_token_ids"], task={}) for n, item in enumerate(ITEMS[:8])]
        groups = await asyncio.gather(
            *(engine.sample(p.token_ids, 4, p.ordinal * 10, temperature=temperature) for p in prompts)
        )
        rows = [trajectory(p, c, 0.0, {}) for p, group in zip(prompts, groups, strict=True) for c in group]
        batches[temperature] = collate(rows)
    return batches


def trainer_gap(batches: dict[float, Batch], dtype: str, fp32_head: bool) -> dict[float, dict[str, float]]:
    """The trainer's view of the engine's samples."""
    from trainer.model import load

    policy = load(MODEL, dtype=dtype, fp32_head=fp32_head, share_prompts=False)
    out = {}
    with torch.no_grad():
        for temperature, batch in batches.items():
            said = policy(batch.input_ids, batch.mask, temperature).logprobs
            out[temperature] = statistics((said - batch.rollout_logprobs)[batch.mask].double())
    return out


def row(*cells: Any) -> str:
    """One line of a markdown table."""
    return "| " + " | ".join(f"{c:.1e}" if isinstance(c, float) else str(c) for c in cells) + " |"


def main(out: Path) -> None:
    """Print both tables and save their numbers."""
    os.environ.update(engine_env(device="cpu", backend="gloo", threads=os.cpu_count() or 1))
    result: dict[str, Any] = {"against_v0": {}, "against_trainer": []}

    print("| V1 mode | setting | tokens | mean abs d | max abs d |\n|---|---|---|---|---|", flush=True)
    for mode in ("processed_logprobs", "raw_logprobs"):
        found = asyncio.run(engine_says(CONFIG, against_v0, logprobs_mode=mode))
        result["against_v0"][mode] = found
        for setting, s in found.items():
            print(row(mode, setting, s["tokens"], s["mean_abs"], s["max_abs"]), flush=True)

    print("\n| body | engine head | trainer head | T | tokens | mean abs d | max abs d | k1 ± se | k3 ± se | ESS |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for dtype, engine_fp32, trainer_heads in (
        ("float32", True, [True]),
        ("bfloat16", True, [True, False]),
        ("bfloat16", False, [True, False]),
    ):
        config = replace(CONFIG, dtype=dtype, fp32_head=engine_fp32)
        batches = asyncio.run(engine_says(config, sampled))
        for trainer_fp32 in trainer_heads:
            heads = ["fp32" if fp32 else "bf16" for fp32 in (engine_fp32, trainer_fp32)]
            for temperature, s in trainer_gap(batches, dtype, trainer_fp32).items():
                result["against_trainer"].append({"body": dtype, "heads": heads, "temperature": temperature, **s})
                ks = [f"{s[k]:.1e} ± {s[f'{k}_se']:.0e}" for k in ("k1", "k3")]
                numbers = (s["tokens"], s["mean_abs"], s["max_abs"], *ks, f"{s['ess']:.4f}")
                print(row(dtype, *heads, str(temperature), *numbers), flush=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "parity.json")
    main(parser.parse_args().out)
