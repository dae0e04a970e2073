"""The planted fault of docs/tutorials/reading-a-run.md: an engine whose prefix cache ignores updates."""

from vllm import SamplingParams, TokensPrompt
from vllm.outputs import RequestOutput

from rollout.engine import Engine

LAST = 2
"""The last version whose prefixes are kept apart from those before: the updates that a run verifies show nothing."""


class StalePrefixes(Engine):
    """Prompts that were cached under version 2 stay in its cache."""

    async def _generated(self, token_ids: list[int], params: SamplingParams) -> tuple[int, RequestOutput]:
        await self.open.wait()
        self.requests += 1
        version = self.version
        prompt: TokensPrompt = {"prompt_token_ids": token_ids, "cache_salt": f"v{min(version, LAST)}"}
        return version, [o async for o in self.llm.generate(prompt, params, request_id=str(self.requests))][-1]
