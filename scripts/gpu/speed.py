"""How fast does our engine sample next to vLLM as it comes? The same model, prompts and lengths, in sequence."""

import argparse
import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from echo_task import make_model
from gpu.setting import Result, base_config, reached


def speed(args: argparse.Namespace) -> Result:
    """Tokens per second of both engines, and what each of our settings costs."""
    cuda = args.device == "cuda"
    shape = {"hidden": 896, "inner": 4864, "layers": 24, "vocabulary": 151936}  # Qwen2.5-0.5B
    shape = shape if cuda else {"hidden": 128, "inner": 128, "layers": 2, "vocabulary": 64}
    model = make_model(Path(args.work) / "speed", device=args.device, **shape)
    requests, tokens = (256, 512) if cuda else (4, 16)
    how = {"max_tokens": tokens, "max_model_len": 1024, "max_num_seqs": 256}
    config = base_config(args, "speed", model, **how)
    config = replace(config, dtype="bfloat16" if cuda else "float32")
    result: Result = {"requests": requests, "tokens of each": tokens}
    bare = {
        "logprobs_mode": "raw_logprobs",
        "hf_overrides": {},
        "async_scheduling": True,
        "enable_prefix_caching": True,
    }
    engines = {
        "vLLM, no log-probabilities": (config, bare, False),
        "ours": (config, {}, True),
        "ours, async scheduling": (replace(config, rollout=replace(config.rollout, async_scheduling=True)), {}, True),
    }
    for name, (settings, overrides, ours) in (engines if cuda else {"ours": engines["ours"]}).items():
        result[f"{name}: start_s"], result[f"{name}: tokens_per_s"] = asyncio.run(
            measured(args, settings, overrides, ours, requests, tokens)
        )
        reached(args, f"'{name}' was measured")
    return result


async def measured(
    args: argparse.Namespace, config: Any, overrides: dict[str, Any], ours: bool, requests: int, tokens: int
) -> tuple[float, float]:
    """Seconds of the start, and tokens per second over all requests."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from rollout.engine import Engine

    began = time.perf_counter()
    backend = "gloo" if args.device == "cpu" else "ipc"
    overrides = overrides | {"load_format": "auto"}
    engine = Engine(config, device=args.device, backend=backend, model=config.model, version=0, overrides=overrides)
    try:
        await engine.start()
        started = time.perf_counter() - began
        engine.stop_ids = []  # every reply has its full length

        async def one(i: int) -> int:
            prompt = [3 + (i + j) % 10 for j in range(64)]
            if ours:
                return len((await engine.sample(prompt, 1, seed=i))[0].token_ids)
            params = SamplingParams(max_tokens=tokens, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
            params.ignore_eos = True
            return len((await engine.generate(prompt, params)).outputs[0].token_ids)

        await asyncio.gather(*(one(i) for i in range(requests)))
        began = time.perf_counter()
        made = sum(await asyncio.gather(*(one(i) for i in range(requests))))
        return started, made / (time.perf_counter() - began)
    finally:
        await engine.close()
