"""Do engine and trainer compute the same log-probabilities? Makes the tables of docs/parity.md.

python scripts/parity.py --out docs/data/parity.json     # about 6 minutes on two cores
"""

import argparse
import asyncio
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rl.batch import collate, trajectory
from rl.config import Config, RolloutConfig
from rl.parity.gap import Gap, gap
from rl.types import Batch, Data, Prompt
from rollout.settings import engine_env
from trainer.machine import cores
from trainer.model.policy import load

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


async def on_engine(config: Config, ask: Any, **overrides: Any) -> Any:
    """Start one engine, run `ask` on it, end it."""
    from rollout.engine import Engine

    # vLLM itself reads the weights from disk, so the result does not depend on our weight channel.
    overrides = {"load_format": "auto", **overrides}
    engine = Engine(config, device="cpu", backend="gloo", model=MODEL, version=0, overrides=overrides)
    await engine.start()
    try:
        return await ask(engine)
    finally:
        await engine.close()


async def against_v0(engine: Any) -> dict[str, Gap]:
    """V1's log-probabilities of the tokens that V0 sampled, by V0's setting."""
    found: dict[str, list[tuple[list[float], list[float]]]] = {}
    for item in ITEMS:
        sampling = {k: item[k] for k in ("temperature", "top_p", "top_k") if item.get(k) is not None}
        scored = await engine.score(item["prompt_token_ids"], item["token_ids"], **sampling)
        found.setdefault(item["setting"], []).append((scored, item["logprobs"]))
    return {setting: ragged_gap(pairs) for setting, pairs in found.items()}


def ragged_gap(pairs: list[tuple[list[float], list[float]]]) -> Gap:
    """The gap between two sides over sequences of different lengths."""
    width = max(len(one) for one, _ in pairs)
    mask = torch.tensor([[t < len(one) for t in range(width)] for one, _ in pairs])
    one, other = (
        torch.tensor([[*pair[side], *[0.0] * (width - len(pair[side]))] for pair in pairs]) for side in (0, 1)
    )
    return gap(one, other, mask)


async def sampled(engine: Any) -> tuple[dict[float, Batch], Gap]:
    """Sequences that the engine samples, by temperature; and, at T = 1, the gap between its prefill and its decode."""
    batches, noise = {}, []
    for temperature in (1.0, 0.7):
        prompts = [Prompt(ordinal=n, token_ids=item["prompt_token_ids"], task={}) for n, item in enumerate(ITEMS[:12])]
        groups = await asyncio.gather(
            *(engine.sample(p.token_ids, 8, p.ordinal * 10, temperature=temperature) for p in prompts)
        )
        pairs = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
        batches[temperature] = collate([trajectory(p, c, 0.0, {}) for p, c in pairs])
        if temperature == 1.0:
            noise = [(await engine.prefill(p.token_ids, c.token_ids), c.logprobs) for p, c in pairs[::2]]
    return batches, ragged_gap(noise)


def trainer_gap(batches: dict[float, Batch], dtype: str, fp32_head: bool) -> dict[float, Gap]:
    """The gap between the trainer and the engine on the engine's samples."""
    policy = load(MODEL, dtype=dtype, fp32_head=fp32_head, share_prompts=False)
    with torch.no_grad():
        return {
            temperature: gap(policy(b.input_ids, b.mask, temperature).logprobs, b.rollout_logprobs, b.mask)
            for temperature, b in batches.items()
        }


def row(*cells: Any) -> str:
    """One line of a markdown table."""
    return "| " + " | ".join(f"{c:.1e}" if isinstance(c, float) else str(c) for c in cells) + " |"


def cells(g: Gap) -> tuple[Any, ...]:
    """A gap as cells of the second table."""
    ks = [f"{k:.1e} ± {se:.0e}" for k, se in ((g.k1, g.k1_se), (g.k3, g.k3_se))]
    return (g.tokens, g.mean_abs, g.max_abs, *ks, f"{g.ess_token:.4f}")


def main(out: Path) -> None:
    """Print both tables and save their numbers."""
    os.environ.update(engine_env(device="cpu", backend="gloo", threads=cores()))
    result: dict[str, Any] = {"against_v0": {}, "against_trainer": []}

    print("| V1 mode | setting | tokens | mean abs d | max abs d |\n|---|---|---|---|---|", flush=True)
    for mode in ("processed_logprobs", "raw_logprobs"):
        found = asyncio.run(on_engine(CONFIG, against_v0, logprobs_mode=mode))
        result["against_v0"][mode] = {setting: asdict(g) for setting, g in found.items()}
        for setting, g in found.items():
            print(row(mode, setting, g.tokens, g.mean_abs, g.max_abs), flush=True)

    print("\n| body | engine head | other side | T | tokens | mean abs d | max abs d | k1 ± se | k3 ± se | ESS |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)

    def show(body: str, engine_head: str, other: str, temperature: float, g: Gap) -> None:
        result["against_trainer"].append(
            {"body": body, "engine_head": engine_head, "other": other, "temperature": temperature, **asdict(g)}
        )
        print(row(body, engine_head, other, str(temperature), *cells(g)), flush=True)

    for dtype, engine_fp32, trainer_heads in (
        ("float32", True, [True]),
        ("bfloat16", True, [True, False]),
        ("bfloat16", False, [True, False]),
    ):
        batches, noise = asyncio.run(on_engine(replace(CONFIG, dtype=dtype, fp32_head=engine_fp32), sampled))
        head = "fp32" if engine_fp32 else "bf16"
        show(dtype, head, "its own prefill", 1.0, noise)
        for trainer_fp32 in trainer_heads:
            for temperature, g in trainer_gap(batches, dtype, trainer_fp32).items():
                show(dtype, head, f"trainer, {'fp32' if trainer_fp32 else 'bf16'} head", temperature, g)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "data" / "parity.json", help="JSON file")
    main(parser.parse_args().out)
