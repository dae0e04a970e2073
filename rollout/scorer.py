"""One vLLM pooling engine: the scores of a reward model, whose weights never change."""

import itertools
from typing import Any

from vllm import PoolingParams, TokensPrompt
from vllm.v1.engine.exceptions import EngineDeadError

from rl.data import Given
from rl.judges.hearing import JudgeError
from rl.judges.reward_model import RewardModel
from rl.protocols import EngineLost
from rollout.core import async_llm
from rollout.process import FrozenWorker, end_vllm

LEAST_BATCH = 4096
"""Tokens of one engine step, where one input is not longer."""


class Scorer:
    """Hosted by one actor. Every method is a coroutine of the same event loop."""

    def __init__(self, judge: RewardModel, *, device: str, trust_remote_code: bool) -> None:
        self.judge, self.device = judge, device
        args = scorer_args(judge, device=device) | {"trust_remote_code": trust_remote_code}
        self.llm = async_llm(args, device=device)
        self.tokenizer: Any = self.llm.get_tokenizer()
        self.requests = itertools.count()

    async def start(self) -> None:
        """From now on vLLM's process ends when this one does."""
        if self.device != "cpu":
            await self.llm.collective_rpc(FrozenWorker.end_with_parent.__name__)

    async def score(self, prompt: Given, reply: str) -> float:
        """The model's one output for a reply to a prompt. Raises EngineLost, and JudgeError as a sentence's end."""
        ids = encoded(self.tokenizer, prompt, reply)
        if len(ids) > self.judge.max_model_len:
            raise JudgeError(
                f"cannot read {len(ids)} tokens of a prompt and a reply: raise max_model_len={self.judge.max_model_len}"
            )
        # None for `use_activation` means a sigmoid, which makes most differences of scores too small to see.
        params = PoolingParams(task="classify", use_activation=False)
        asked: TokensPrompt = {"prompt_token_ids": ids}
        try:
            output = [o async for o in self.llm.encode(asked, params, request_id=str(next(self.requests)))][-1]
        except EngineDeadError:
            raise EngineLost("vLLM's own process has ended") from None
        score = output.outputs.data.flatten()
        if len(score) != 1 or not score.isfinite().all():
            raise JudgeError(f"returned {score.tolist()[:4]}, which is not one finite number")
        return score.item()

    async def close(self) -> None:
        """End vLLM's processes."""
        end_vllm(self.llm)
        del self.llm


def encoded(tokenizer: Any, prompt: Given, reply: str) -> list[int]:
    """Prompt and reply as a reward model reads them: by its chat template, or without one as a pair of texts."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not all(isinstance(message, dict) for message in messages):
        raise JudgeError("reads text or messages, and this prompt is a list of token ids: decode it first")
    if tokenizer.chat_template:
        whole = [*messages, {"role": "assistant", "content": reply}]
        return list(tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False))
    before = "\n".join(str(message.get("content", "")) for message in messages if isinstance(message, dict))
    return list(tokenizer(before, reply)["input_ids"])


def scorer_args(judge: RewardModel, *, device: str) -> dict[str, Any]:
    """Keyword arguments of `AsyncEngineArgs` for a reward model on "cpu" or "cuda"."""
    args: dict[str, Any] = {
        "model": judge.model,
        "runner": "pooling",
        "dtype": judge.dtype,
        "max_model_len": judge.max_model_len,
        "max_num_seqs": judge.max_num_seqs,
        "max_num_batched_tokens": max(LEAST_BATCH, judge.max_model_len),
        # A score must not depend on what was scored before.
        "enable_prefix_caching": False,
        "enforce_eager": device == "cpu",
        "worker_extension_cls": "rollout.process.FrozenWorker",
        "disable_log_stats": True,
    }
    if device == "cpu":
        return args | {"kv_cache_memory_bytes": int(judge.kv_cache_gib * 2**30)}
    return args | {"gpu_memory_utilization": judge.gpu_memory_utilization}
