"""One vLLM V1 engine: samples with versions on every token, and takes new weights while it samples."""

import asyncio
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

from vllm import AsyncEngineArgs, SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from rl.config import Config
from rl.protocols import EngineLost, UpdateFailed
from rl.tokens import encode
from rl.types import Completion
from rollout import process as forkserver
from rollout.settings import engine_args

T = TypeVar("T")
UNSENT = -100
"""Version of an engine that has had no weights from the learner yet. It holds random ones, and serves only the doctor,
who may send versions below 0 of his own."""


class Engine:
    """Hosted by one actor; every method is a coroutine of the same event loop."""

    def __init__(
        self,
        config: Config,
        *,
        device: str,
        backend: str,
        model: str,
        version: int = UNSENT,
        overrides: dict[str, Any] | None = None,
    ) -> None:
        """`overrides` replace engine arguments: for experiments that show what a wrong setting does."""
        self.config = config
        if device == "cpu":
            forkserver.use()
        args = engine_args(config, device=device, backend=backend, model=model) | (overrides or {})
        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
        self.version = version
        self.requests = 0
        self.aborted = 0
        self.open = asyncio.Event()
        self.updating = False
        """Whether an update has begun to change the live weights."""
        self.paused_at = 0.0
        self.pause_seconds = 0.0
        """How long the last update stopped sampling."""

    async def start(self) -> None:
        """Label the start weights and open for requests."""
        await self._or_lost(self.llm.collective_rpc("end_with_parent"))
        await self._or_lost(self.llm.update_weight_version(str(self.version)))
        self.open.set()

    async def sample(
        self,
        token_ids: list[int],
        n: int,
        seed: int | None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        fresh: bool = False,
    ) -> list[Completion]:
        """n completions of one prompt, with the log-probabilities (nats) that they were sampled with.

        `temperature` and `max_tokens` of None mean the run's; sample i has the seed `seed + i`. `fresh` ignores cached
        prefixes.
        """
        sampling = self._sampling(temperature, max_tokens) | {"skip_reading_prefix_cache": fresh}
        seeds = [None if seed is None else seed + i for i in range(n)]
        return list(await asyncio.gather(*(self._one(token_ids, seed=s, **sampling) for s in seeds)))

    def _sampling(self, temperature: float | None, max_tokens: int | None) -> dict[str, Any]:
        c = self.config
        sampling = {
            "temperature": c.temperature if temperature is None else temperature,
            "max_tokens": max_tokens or c.rollout.max_tokens,
            "top_p": c.rollout.top_p,
            "top_k": c.rollout.top_k,
            "min_p": c.rollout.min_p,
        }
        if c.rollout.truncation and sampling["temperature"] == 0:
            # An engine that reports the kept tokens refuses greedy requests; to keep the best token alone is the same.
            sampling |= {"temperature": 1.0, "top_p": 1.0, "top_k": 1, "min_p": 0.0}
        return sampling

    async def score(self, token_ids: list[int], reply: list[int], **sampling: Any) -> list[float]:
        """Log-probabilities (nats) that this engine would have given to a reply's tokens, had it sampled them.

        Each token is asked for by a request of its own, so it went through the very sampler that rollouts use
        (`prompt_logprobs` does not: vLLM leaves temperature out of it). `sampling` may set temperature, top_p, top_k.
        """

        async def one(position: int) -> float:
            token = reply[position]
            params = SamplingParams(max_tokens=1, logprob_token_ids=[token], detokenize=False, **sampling)
            output = await self._final(token_ids + reply[:position], params)
            return output.outputs[0].logprobs[0][token].logprob

        return list(await asyncio.gather(*(one(i) for i in range(len(reply)))))

    async def prefill(self, token_ids: list[int], reply: list[int]) -> list[float]:
        """Log-probabilities (nats) of a reply's tokens at T = 1 from one forward pass over all of them."""
        params = SamplingParams(max_tokens=1, top_k=1, prompt_logprobs=0, detokenize=False)
        output = await self._final(token_ids + reply, params)
        steps = output.prompt_logprobs[len(token_ids) :]
        return [step[token].logprob for step, token in zip(steps, reply, strict=True)]

    async def _one(self, token_ids: list[int], **sampling: Any) -> Completion:
        params = SamplingParams(**sampling, logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        output = await self._final(token_ids, params)
        assert output.finished, "vLLM ended a request without its final output"
        done = output.outputs[0]
        self.aborted += done.finish_reason == "abort"
        if self.llm.model_config.return_sampling_mask and done.token_ids and done.sampling_mask is None:
            raise RuntimeError(
                "vLLM cut the vocabulary and did not report which tokens it kept, so no trainer can replay it: sample "
                "with top_p=1, top_k=0, min_p=0"
            )
        return completion(done, output.num_cached_tokens or 0)

    async def _final(self, token_ids: list[int], params: SamplingParams) -> Any:
        """The last output of one request, which sees cached prefixes of the weights of now only."""
        # A request that came in while paused would run on the new weights under the old version's salt.
        await self.open.wait()
        self.requests += 1
        prompt = {"prompt_token_ids": token_ids, "cache_salt": f"v{self.version}"}
        try:
            return [o async for o in self.llm.generate(prompt, params, request_id=str(self.requests))][-1]
        except EngineDeadError:
            raise EngineLost("vLLM's own process is gone") from None

    async def _or_lost(self, call: Awaitable[T]) -> T:
        """vLLM's answer. EngineLost when its process dies, of which vLLM does not tell those that already wait."""
        asked = asyncio.ensure_future(call)
        while not asked.done():
            await asyncio.wait([asked], timeout=1.0)
            if not asked.done() and self.llm.errored:
                asked.cancel()
                raise EngineLost("vLLM's own process is gone")
        try:
            return await asked
        except EngineDeadError:
            raise EngineLost("vLLM's own process is gone") from None

    async def pause(self) -> None:
        """Freeze running requests where they are; vLLM's defaults would abort them. To clear the cache while they are
        kept is to have their KV computed anew when they go on."""
        self.open.clear()
        anew = self.config.rollout.recompute_kv
        await self._or_lost(self.llm.pause_generation(mode="keep", clear_cache=anew))
        self.paused_at = time.perf_counter()

    async def resume(self) -> float:
        """Go on sampling; returns the seconds of the pause."""
        await self._or_lost(self.llm.resume_generation())
        self.open.set()
        return time.perf_counter() - self.paused_at

    async def expected_weights(self) -> set[str]:
        """Checkpoint names that an update must bring."""
        return set().union(*await self._or_lost(self.llm.collective_rpc("expected_weights")))

    async def listen_to_weights(self, on: bool) -> None:
        """Whether the next updates are digested as they arrive."""
        await self._or_lost(self.llm.collective_rpc("listen_to_weights", args=(on,)))

    async def received_digests(self) -> list[dict[str, str]]:
        """Digests of the last update by name, one dictionary for each of this engine's workers."""
        return await self._or_lost(self.llm.collective_rpc("received_digests"))

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join the weight channel."""
        await self._or_lost(self.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info)))

    async def stage_weights(self, version: int) -> None:
        """On CPU: begin to receive a version beside the live weights, while sampling goes on."""
        await self._ask_workers("stage_weights", version)

    async def start_weight_update(self) -> None:
        """Pause and begin an update: a step between begin and commit kills vLLM."""
        await self.pause()
        self.updating = True
        await self._or_lost(self.llm.start_weight_update())

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive the tensors of an update (or of a part of it)."""
        await self._or_lost(self.llm.update_weights(WeightTransferUpdateRequest(update_info=update_info)))

    async def finish_weight_update(self, version: int) -> None:
        """Commit the update, and resume: tokens sampled from now on carry `version`."""
        # The same version again is how an engine that came back gets the weights that the others hold.
        if version < self.version:
            raise UpdateFailed(f"weight versions never fall: {self.version} -> {version}")
        if not self.updating:
            # Staged weights are all here by now, so the pause only covers their exchange, which cannot fail.
            await self._ask_workers("against_commit", version)
            await self._or_lost(self.llm.start_weight_update())
            await self.pause()
        await self._or_lost(self.llm.finish_weight_update(weight_version=str(version)))
        self.version, self.updating = version, False
        self.pause_seconds = await self.resume()

    async def _ask_workers(self, method: str, version: int) -> None:
        """Raise UpdateFailed with what any worker has against it."""
        for said in await self._or_lost(self.llm.collective_rpc(method, args=(version,))):
            if said:
                raise UpdateFailed(f"weight version {version}: {said}")

    async def last_pause(self) -> float:
        """Seconds that the last update stopped sampling."""
        return self.pause_seconds

    async def describe(self, messages: Any, template: dict[str, Any]) -> dict[str, Any]:
        """What this engine really runs with, and how its own tokenizer writes one prompt (`messages` or plain text)."""
        c = self.llm.vllm_config
        model, tokenizer = c.model_config, self.llm.get_tokenizer()
        params = SamplingParams(**self._sampling(None, None))
        return {
            "logprobs_mode": model.logprobs_mode,
            "dtype": str(model.dtype).removeprefix("torch."),
            "head_dtype": str(model.head_dtype).removeprefix("torch."),
            "tied": bool(getattr(model.hf_text_config, "tie_word_embeddings", False)),
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": max(params.top_k, 0),
            "min_p": params.min_p,
            "penalties": [params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1.0],
            "async_scheduling": bool(c.scheduler_config.async_scheduling),
            "prefix_caching": bool(c.cache_config.enable_prefix_caching),
            "eager": bool(model.enforce_eager),
            "sampling_mask": bool(model.return_sampling_mask),
            "generation_config": model.generation_config,
            "generation_eos": model.try_get_generation_config().get("eos_token_id"),
            "eos": tokenizer.eos_token_id,
            "vocabulary": len(tokenizer),
            "chat_template": tokenizer.chat_template,
            "prompt": encode(tokenizer, messages, template),
        }

    async def trace(self, token_ids: list[int]) -> list[dict[str, Any]]:
        """Inputs and outputs of every layer that holds weights for one prompt, by worker. No cached prefix is used."""
        await self._or_lost(self.llm.collective_rpc("begin_trace"))
        params = SamplingParams(max_tokens=1, top_k=1, detokenize=False, skip_reading_prefix_cache=True)
        await self._final(token_ids, params)
        return await self._or_lost(self.llm.collective_rpc("end_trace"))

    async def alive(self) -> None:
        """Raise EngineLost when vLLM's processes are gone, or an update was left half done, which nothing undoes."""
        await self._or_lost(self.llm.check_health())
        if self.updating:
            raise EngineLost("it holds half an update")

    async def counters(self) -> dict[str, int]:
        """Requests served and requests aborted since the start, and the weight version."""
        return {"requests": self.requests, "aborted": self.aborted, "version": self.version}

    async def close(self) -> None:
        """End vLLM's processes. They hold nothing worth more than a second; their own farewell takes several."""
        self.llm.shutdown(timeout=1.0)
        del self.llm


def completion(done: CompletionOutput, cached_prompt_tokens: int) -> Completion:
    """vLLM's output in our terms. A missing log-probability becomes NaN, which the loop sets aside."""
    token_ids = list(done.token_ids)
    steps = done.logprobs or [{}] * len(token_ids)
    versions: list[int | None] = [None] * len(token_ids)
    for span in done.weight_versions or []:
        versions[span.start : span.end] = [int(span.version)] * (span.end - span.start)
    assert None not in versions, f"vLLM gave no weight version for some tokens: {done.weight_versions}"
    support = done.sampling_mask.token_ids if done.sampling_mask else None
    if support is not None:
        kept = all(token in ids for token, ids in zip(token_ids, support, strict=True))
        assert kept, "vLLM sampled a token that it reports as cut off"
    return Completion(
        token_ids=token_ids,
        logprobs=[
            step[token].logprob if token in step else float("nan") for step, token in zip(steps, token_ids, strict=True)
        ],
        versions=versions,
        finish_reason=done.finish_reason,
        cached_prompt_tokens=cached_prompt_tokens,
        support=support,
    )
