"""A reward model in vLLM's pooling engine has the scores of transformers, without a sigmoid."""

import asyncio
from unittest.mock import patch

import pytest
import torch
from transformers import AutoTokenizer

from live import in_own_process  # it sets the environment of an engine, before vLLM is imported
from reward_models import make_reward_model
from rl.judges import JudgeError, RewardModel
from rollout.scorer import Scorer, encoded

CASES = [("2+2?", "4"), ("2+2?", "5"), ("Say something.", "abc " * 30), ("p", "")]


def test_scores_are_those_of_transformers(tmp_path):
    reference = make_reward_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    given = [encoded(tokenizer, prompt, reply) for prompt, reply in CASES]
    assert tokenizer.decode(given[0]).replace(" ", "") == "u:2+2?;a:4;"
    with torch.no_grad():
        wanted = [reference(input_ids=torch.tensor([ids])).logits.item() for ids in given]
    assert max(wanted) - min(wanted) > 3

    async def scored() -> list[float]:
        judge = RewardModel(model=str(tmp_path), dtype="float32", max_model_len=200, kv_cache_gib=0.05)
        with patch("rollout.scorer.async_llm", in_own_process):
            scorer = Scorer(judge, device="cpu", trust_remote_code=False)
        await scorer.start()
        try:
            scores = await asyncio.gather(*(scorer.score(prompt, reply) for prompt, reply in CASES))
            with pytest.raises(JudgeError, match=r"cannot read 257 tokens.*max_model_len=200"):
                await scorer.score("p", "x" * 250)
            return list(scores)
        finally:
            await scorer.close()

    assert asyncio.run(scored()) == pytest.approx(wanted, abs=1e-5)
