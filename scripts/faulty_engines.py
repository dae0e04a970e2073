"""What does vLLM V1 do where this framework does otherwise? One engine for each of the four fixes, with it off.

Only scripts/four_fixes.py hosts these; no run can ask for them.
"""

import time
from typing import Any, ClassVar

from vllm import SamplingParams

from rollout.engine import Engine


class _Overridden(Engine):
    """An engine with vLLM's own value for some of its arguments."""

    arguments: ClassVar[dict[str, Any]] = {}

    def __init__(self, *args: Any, overrides: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, overrides=self.arguments | (overrides or {}), **kwargs)


class RawLogprobs(_Overridden):
    """Fix 1 off. V1 reports log-probabilities from before the temperature unless told otherwise."""

    arguments: ClassVar[dict[str, Any]] = {"logprobs_mode": "raw_logprobs"}


class UnsaltedPrefixes(Engine):
    """Fix 2 off. V1 caches prefixes and does not ask which weights computed them.

    Its other default, async scheduling, does not exist on CPU.
    """

    async def _final(self, token_ids: list[int], params: SamplingParams) -> Any:
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


class ModelDtypeHead(_Overridden):
    """Fix 4 off. V1 computes logits in the model's dtype, which on a GPU is bf16; the body stays in fp32 here, so that
    nothing but the head differs."""

    arguments: ClassVar[dict[str, Any]] = {"hf_overrides": {"head_dtype": "bfloat16"}}
