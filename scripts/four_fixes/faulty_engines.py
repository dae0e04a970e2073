"""One engine per fix of vLLM V1, with that fix off: what V1 does by default.

Only scripts/four_fixes/four_fixes.py runs them; no config can select them.
"""

import time
from typing import Any, ClassVar

from vllm import SamplingParams
from vllm.outputs import RequestOutput

from rollout.engine import Engine


class EngineWithArguments(Engine):
    """An engine with vLLM's default for some of its arguments."""

    arguments: ClassVar[dict[str, Any]] = {}

    def __init__(self, *args: Any, overrides: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, overrides=self.arguments | (overrides or {}), **kwargs)


class RawLogprobs(EngineWithArguments):
    """Fix 1 off. By default V1 reports log-probabilities from before the temperature."""

    arguments: ClassVar[dict[str, Any]] = {"logprobs_mode": "raw_logprobs"}


class UnsaltedPrefixes(Engine):
    """Fix 2 off. V1's prefix cache ignores which weights computed an entry.

    Its other default, async scheduling, does not exist on CPU.
    """

    async def generate(self, token_ids: list[int], params: SamplingParams) -> RequestOutput:
        await self.open.wait()
        self.requests += 1
        outputs = self.llm.generate({"prompt_token_ids": token_ids}, params, request_id=str(self.requests))
        return [o async for o in outputs][-1]


class AbortingUpdates(Engine):
    """Fix 3 off. `pause_generation()` without arguments aborts every running request, and clears the cache."""

    async def pause(self) -> None:
        self.open.clear()
        await self.llm.pause_generation()
        self.paused_at = time.perf_counter()


class ModelDtypeHead(EngineWithArguments):
    """Fix 4 off. V1 computes logits in the model's dtype, which is bf16 on a GPU. The body stays in fp32 here, so only
    the head differs."""

    arguments: ClassVar[dict[str, Any]] = {"hf_overrides": {"head_dtype": "bfloat16"}}
