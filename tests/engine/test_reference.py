"""V1 with our settings says what vLLM V0 0.8.5 said, the engine that the seed's story calls right; raw V1 does not.

The reference is a file of V0's own tokens and log-probabilities; `tests/data/vllm_v0_fp32.json` is a subset of it.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from live import Live, engine_config
from rl.batch import collate, trajectory
from rl.config import RolloutConfig
from rl.types import Completion, Prompt
from trainer.model import load

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "smollm2-135m"
ITEMS = json.loads((ROOT / "tests" / "data" / "vllm_v0_fp32.json").read_text())["items"]
CONFIG = engine_config(MODEL, rollout=RolloutConfig(max_tokens=48, max_model_len=192, kv_cache_gib=0.5))


def v1_gap(engine: Live, items: list[dict]) -> float:
    gaps = []
    for item in items:
        sampling = {k: item[k] for k in ("temperature", "top_p", "top_k") if item.get(k) is not None}
        said = engine.wait(engine.engine.score(item["prompt_token_ids"], item["token_ids"], **sampling))
        gaps.append((torch.tensor(said) - torch.tensor(item["logprobs"])).abs())
    return float(torch.cat(gaps).mean())


@pytest.fixture(scope="module")
def processed(live: Callable) -> Live:
    return live(CONFIG)


@pytest.mark.parametrize("setting", sorted({item["setting"] for item in ITEMS}))
def test_v1_with_our_settings_agrees_with_v0_in_fp32(processed: Live, setting: str) -> None:
    items = [item for item in ITEMS if item["setting"] == setting]
    assert len(items) >= 4
    assert v1_gap(processed, items) <= 1e-5


def test_v1_in_its_default_raw_mode_does_not_agree_with_v0(live: Callable) -> None:
    raw = live(CONFIG, logprobs_mode="raw_logprobs")
    assert v1_gap(raw, [item for item in ITEMS if item["temperature"] == 0.7]) > 0.1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_trainer_agrees_with_v0_in_fp32(temperature: float) -> None:
    policy = load(str(MODEL), dtype="float32", fp32_head=True, share_prompts=True)
    items = [i for i in ITEMS if i["temperature"] == temperature and not i.get("top_p") and not i.get("top_k")]
    assert len(items) >= 4
    rows = [
        trajectory(
            Prompt(ordinal=n, token_ids=item["prompt_token_ids"], task={}),
            Completion(
                token_ids=item["token_ids"],
                logprobs=item["logprobs"],
                versions=[0] * len(item["token_ids"]),
                finish_reason="stop",
            ),
            0.0,
            {},
        )
        for n, item in enumerate(items)
    ]
    batch = collate(rows)
    with torch.no_grad():
        said = policy(batch.input_ids, batch.mask, temperature).logprobs
    assert float((said - batch.rollout_logprobs)[batch.mask].abs().mean()) <= 1e-5


def test_in_bf16_with_fp32_heads_on_both_sides_k3_stays_small(live: Callable) -> None:
    engine = live(replace(CONFIG, dtype="bfloat16"))
    policy = load(str(MODEL), dtype="bfloat16", fp32_head=True, share_prompts=False)
    rows = []
    for n, item in enumerate(ITEMS[:6]):
        prompt = Prompt(ordinal=n, token_ids=item["prompt_token_ids"], task={})
        rows += [trajectory(prompt, c, 0.0, {}) for c in engine.sample(prompt.token_ids, 4, seed=n, max_tokens=24)]
    batch = collate(rows)
    with torch.no_grad():
        d = (policy(batch.input_ids, batch.mask, 1.0).logprobs - batch.rollout_logprobs)[batch.mask]
    assert d.numel() > 200
    assert float((d.exp() - d - 1).mean()) <= 2e-3
    assert float(d.abs().mean()) > 1e-4, "bf16 cannot agree this well: is the engine really in bf16?"
