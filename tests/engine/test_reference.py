"""V1 with our settings says what vLLM V0 0.8.5 said, the engine that the seed's story calls right; raw V1 does not.

The reference is a file of V0's own tokens and log-probabilities; `tests/data/vllm_v0_fp32.json` is a subset of it.
"""

import asyncio
import json
import math
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import nightly_unless
from faults import in_worker
from live import Live, engine_config
from rl.batch import collate, trajectory
from rl.config import RolloutConfig
from rl.sampling.truncation import Truncation
from rl.types import Batch, Completion, Prompt
from trainer.model.policy import Policy, load

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "smollm2-135m"
ITEMS = json.loads((ROOT / "tests" / "data" / "vllm_v0_fp32.json").read_text())["items"]
SETTINGS = sorted({item["setting"] for item in ITEMS})
CONFIG = engine_config(MODEL, rollout=RolloutConfig(max_tokens=48, max_model_len=192, kv_cache_gib=0.5))
TRUNCATED = replace(CONFIG, rollout=replace(CONFIG.rollout, top_p=0.95, top_k=40, min_p=0.01))


TIE = ("T1.3_top_k20", 1014, 14), -2.394640
"""One of the 986 tokens, and its log-probability among 21: ranks 20 and 21 are 6e-6 nats apart there. V0 kept 20; on
processors that round the two to one number (AMD's, where we looked) top-k keeps both."""


def v1_gap(engine: Live, items: list[dict]) -> float:
    async def score_all() -> list[list[float]]:
        return await asyncio.gather(*(score(item) for item in items))

    def score(item: dict) -> Coroutine[Any, Any, list[float]]:
        sampling = {k: item[k] for k in ("temperature", "top_p", "top_k") if item.get(k) is not None}
        return engine.engine.score(item["prompt_token_ids"], item["token_ids"], **sampling)

    said = engine.wait(score_all())
    return float(torch.cat([one_gap(item, torch.tensor(x)) for item, x in zip(items, said, strict=True)]).mean())


def sampled(engine: Live, items: list[dict], n: int, **sampling: Any) -> Batch:
    """n replies of the engine to each item's prompt, all under way at once; what is sampled is a batch."""

    async def sample_all() -> list[list[Completion]]:
        asks = (engine.engine.sample(x["prompt_token_ids"], n, seed, **sampling) for seed, x in enumerate(items))
        return await asyncio.gather(*asks)

    prompts = [Prompt(ordinal=i, token_ids=x["prompt_token_ids"], task={}) for i, x in enumerate(items)]
    replies = engine.wait(sample_all())
    return collate([trajectory(p, c, 0.0, {}) for p, cs in zip(prompts, replies, strict=True) for c in cs])


def shortest(items: list[dict], n: int) -> list[dict]:
    return sorted(items, key=lambda item: len(item["token_ids"]))[:n]


def one_gap(item: dict, said: torch.Tensor) -> torch.Tensor:
    """|d| of every token of one reply; where V0's 20 tokens may be 21, to the nearer one."""
    gap = (said - torch.tensor(item["logprobs"])).abs()
    (setting, seed, n), among_21 = TIE
    if (item["setting"], item["seed"]) == (setting, seed):
        gap[n] = min(gap[n], abs(said[n] - among_21))
    return gap


@pytest.fixture(scope="module")
def processed(live: Callable) -> Live:
    # `score` states its own sampling; the truncation is for `sample`.
    return live(TRUNCATED, worker_extension_cls="faults.FaultyExtension")


@pytest.mark.parametrize("setting", nightly_unless(lambda setting: "top_p" in setting, SETTINGS))
def test_v1_with_our_settings_agrees_with_v0_in_fp32(processed: Live, setting: str) -> None:
    items = [item for item in ITEMS if item["setting"] == setting]
    assert len(items) == 6
    assert v1_gap(processed, items) <= 1e-5


def test_v1_in_its_default_raw_mode_does_not_agree_with_v0(processed: Live) -> None:
    items = shortest([item for item in ITEMS if item["setting"] == "T0.7"], 2)
    with in_worker(processed, "raw"):
        assert v1_gap(processed, items) > 0.1
    assert v1_gap(processed, items[:1]) <= 1e-5


def reference(setting: str) -> tuple[Batch, float, Truncation]:
    """V0's sequences of one setting with its log-probabilities as the rollout's, the temperature and the truncation."""
    items = [i for i in ITEMS if i["setting"] == setting]
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
    truncation = Truncation(top_p=items[0].get("top_p") or 1.0, top_k=items[0].get("top_k") or 0)
    return collate(rows), items[0]["temperature"], truncation


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load(str(MODEL), dtype="float32", fp32_head=True, share_prompts=True)


def said_by(policy: Policy, batch: Batch, temperature: float, truncation: Truncation | None) -> torch.Tensor:
    with torch.no_grad():
        return policy(batch.input_ids, batch.mask, temperature, truncation).logprobs


def gaps(policy: Policy, batch: Batch, temperature: float, truncation: Truncation | None) -> torch.Tensor:
    return (said_by(policy, batch, temperature, truncation) - batch.rollout_logprobs)[batch.mask].abs()


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_trainer_agrees_with_v0_in_fp32(policy: Policy, setting: str) -> None:
    batch, temperature, truncation = reference(setting)
    said = said_by(policy, batch, temperature, None if truncation == Truncation() else truncation)
    items = [item for item in ITEMS if item["setting"] == setting]
    mine = [one_gap(item, row[mask]) for item, row, mask in zip(items, said, batch.mask, strict=True)]
    assert torch.cat(mine).mean() <= 1e-5
    if truncation != Truncation():
        assert gaps(policy, batch, temperature, None).mean() > 0.01, "the whole vocabulary is not what V0 sampled from"


def test_under_truncation_the_trainer_agrees_with_what_the_engine_sampled(processed: Live, policy: Policy) -> None:
    batch = sampled(processed, ITEMS[:4], 2)
    assert batch.support is None, "the CPU engine reports no support"
    assert batch.mask.sum() > 200
    cut = TRUNCATED.rollout.truncation
    d = gaps(policy, batch, 1.0, cut)
    ties = d > 1e-3  # two ranks that one side's rounding makes one, as in `TIE`
    assert ties.sum() <= 1
    assert d[~ties].mean() <= 1e-5
    # None of the three settings can be left out.
    for less in (replace(cut, top_p=1.0), replace(cut, top_k=0), replace(cut, min_p=0.0)):
        assert gaps(policy, batch, 1.0, less).mean() > 1e-4


def test_a_greedy_evaluation_of_a_truncated_run_takes_the_best_token(processed: Live, policy: Policy) -> None:
    item = ITEMS[0]
    prompt = Prompt(ordinal=0, token_ids=item["prompt_token_ids"], task={})
    said = processed.sample(prompt.token_ids, 2, seed=3, temperature=0.0, max_tokens=16)
    assert said[0].token_ids == said[1].token_ids
    batch = collate([trajectory(prompt, said[0], 0.0, {})])
    assert not gaps(policy, batch, 1.0, Truncation(top_k=1)).any()


@pytest.mark.nightly
def test_in_bf16_with_fp32_heads_on_both_sides_k3_stays_small(live: Callable) -> None:
    engine = live(replace(CONFIG, dtype="bfloat16"))
    policy = load(str(MODEL), dtype="bfloat16", fp32_head=True, share_prompts=False)
    batch = sampled(engine, ITEMS[:4], 4, max_tokens=16)
    with torch.no_grad():
        d = (policy(batch.input_ids, batch.mask, 1.0).logprobs - batch.rollout_logprobs)[batch.mask]
    assert d.numel() > 200
    k3 = d.expm1() - d
    # Both tails are long, and few tokens decide k3: the bound is held to two standard errors, and the mean beside it.
    assert float(k3.mean() - 2 * k3.std() / math.sqrt(len(k3))) <= 2e-3
    assert float(d.abs().mean()) <= 6e-2
    assert float(d.abs().mean()) > 1e-4, "bf16 cannot agree this well: is the engine really in bf16?"
