"""One vLLM V1 engine: samples with versions on every token, and takes new weights while it samples."""

import asyncio
import time
from typing import Any

from vllm import AsyncEngineArgs, SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from rl.config import Config
from rl.types import Completion
from rollout.settings import engine_args


class Engine:
    """Hosted by one actor; every method is a coroutine of the same event loop."""

    def __init__(
        self,
        config: Config,
        *,
        device: str,
        backend: str,
        model: str,
        version: int = 0,
        overrides: dict[str, Any] | None = None,
    ) -> None:
        """`overrides` replace engine arguments: for experiments that show what a wrong setting does."""
        self.config = config
        args = engine_args(config, device=device, backend=backend, model=model) | (overrides or {})
        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
        self.version = version
        self.requests = 0
        self.aborted = 0
        self.open = asyncio.Event()
        self.paused_at = 0.0

    async def start(self) -> None:
        """Label the start weights and open for requests."""
        await self.llm.update_weight_version(str(self.version))
        self.open.set()

    async def sample(
        self,
        token_ids: list[int],
        n: int,
        seed: int | None,
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> list[Completion]:
        """n completions of one prompt, with the log-probabilities (nats) that they were sampled with.

        `temperature` and `max_tokens` of None mean the run's; sample i has the seed `seed + i`.
        """
        shared = {
            "temperature": self.config.temperature if temperature is None else temperature,
            "max_tokens": max_tokens or self.config.rollout.max_tokens,
        }
        seeds = [None if seed is None else seed + i for i in range(n)]
        return list(await asyncio.gather(*(self._one(token_ids, seed=s, **shared) for s in seeds)))

    async def score(self, token_ids: list[int], reply: list[int], **sampling: Any) -> list[float]:
        """Log-probabilities (nats) that this engine would have given to a reply's tokens, had it sampled them.

        Each token is asked for by a request of its own, so it went through the very sampler that rollouts use
        (`prompt_logprobs` does not: vLLM leaves temperature out of it). `sampling` may set temperature, top_p, top_k.
        """

        async def one(position: int) -> float:
            token = reply[position]
            params = SamplingParams(max_tokens=1, logprob_token_ids=[token], detokenize=False, **sampling)
            self.requests += 1
            prompt = {"prompt_token_ids": token_ids + reply[:position], "cache_salt": f"v{self.version}"}
            outputs = [o async for o in self.llm.generate(prompt, params, request_id=str(self.requests))]
            return outputs[-1].outputs[0].logprobs[0][token].logprob

        return list(await asyncio.gather(*(one(i) for i in range(len(reply)))))

    async def _one(self, token_ids: list[int], **sampling: Any) -> Completion:
        params = SamplingParams(
            **sampling,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        # A request that came in while paused would run on the new weights under the old version's salt.
        await self.open.wait()
        self.requests += 1
        prompt = {"prompt_token_ids": token_ids, "cache_salt": f"v{self.version}"}
        outputs = [o async for o in self.llm.generate(prompt, params, request_id=str(self.requests))]
        output = outputs[-1]
        assert output.finished, "vLLM ended a request without its final output"
        done = output.outputs[0]
        self.aborted += done.finish_reason == "abort"
        return completion(done, output.num_cached_tokens or 0)

    async def pause(self) -> None:
        """Freeze running requests where they are, with their KV (vLLM's defaults would abort them and clear it)."""
        self.open.clear()
        self.paused_at = time.perf_counter()
        await self.llm.pause_generation(mode="keep", clear_cache=False)

    async def resume(self) -> float:
        """Go on sampling; returns the seconds of the pause."""
        await self.llm.resume_generation()
        self.open.set()
        return time.perf_counter() - self.paused_at

    async def expected_weights(self) -> set[str]:
        """Checkpoint names that an update must bring."""
        return set().union(*await self.llm.collective_rpc("expected_weights"))

    async def listen_to_weights(self, on: bool) -> None:
        """Whether the next updates are digested as they arrive."""
        await self.llm.collective_rpc("listen_to_weights", args=(on,))

    async def received_digests(self) -> list[dict[str, str]]:
        """Digests of the last update by name, one dictionary for each of this engine's workers."""
        return await self.llm.collective_rpc("received_digests")

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join the weight channel."""
        await self.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def start_weight_update(self) -> None:
        """Begin an update. The engine must be paused: a step between begin and commit kills vLLM."""
        assert not self.open.is_set(), "an update needs a paused engine"
        await self.llm.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive the tensors of an update (or of a part of it)."""
        await self.llm.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def finish_weight_update(self, version: int) -> None:
        """Commit the update: tokens sampled from now on carry `version`."""
        assert version > self.version, f"versions only grow: {self.version} -> {version}"
        await self.llm.finish_weight_update(weight_version=str(version))
        self.version = version

    async def counters(self) -> dict[str, int]:
        """Requests served and requests aborted since the start, and the weight version."""
        return {"requests": self.requests, "aborted": self.aborted, "version": self.version}

    async def close(self) -> None:
        """End vLLM's processes."""
        self.llm.shutdown()
        del self.llm


def completion(done: CompletionOutput, cached_prompt_tokens: int) -> Completion:
    """vLLM's output in our terms. A missing log-probability becomes NaN, which the loop sets aside."""
    token_ids = list(done.token_ids)
    steps = done.logprobs or [{}] * len(token_ids)
    versions = [-1] * len(token_ids)
    for span in done.weight_versions or []:
        versions[span.start : span.end] = [int(span.version)] * (span.end - span.start)
    assert -1 not in versions, f"vLLM gave no weight version for some tokens: {done.weight_versions}"
    return Completion(
        token_ids=token_ids,
        logprobs=[
            step[token].logprob if token in step else float("nan") for step, token in zip(steps, token_ids, strict=True)
        ],
        versions=versions,
        finish_reason=done.finish_reason,
        cached_prompt_tokens=cached_prompt_tokens,
    )
