"""How an engine answers the doctor: scores of given tokens, one prefill, its real settings, a trace of its layers.

The learner's side has the same file name: `trainer/learner/examine.py`.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from vllm import SamplingParams
from vllm.outputs import RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM

from rl.data import Given
from rl.parity.architecture import architecture
from rl.sampling.forbidden import Forbidden
from rl.tokens import Rendering, encode
from rl.types import Completion
from rollout.worker import WorkerExtension

Sample = Callable[[], Awaitable[list[Completion]]]
"""Samples one reply as a rollout does."""
TRACED_REPLY = 4
"""Tokens that are sampled while layers are traced: the first after the prefill, each other one after a decode step."""
SampledAndTraced = tuple[Completion, list[dict[str, Any]]]
"""One reply, and what each worker's sampler did for it."""
Generate = Callable[[list[int], SamplingParams], Awaitable[RequestOutput]]
"""`Engine.generate`: the final output of one request."""
CallWorkers = Callable[[Callable[[WorkerExtension], Any]], Awaitable[list[Any]]]
"""`Engine.call_workers`: one result per worker."""


async def token_logprob(generate: Generate, context: list[int], token: int, sampling: dict[str, Any]) -> float:
    """Log-probability (nats) of one token after `context`, from the sampler that rollouts use."""
    params = SamplingParams(max_tokens=1, logprob_token_ids=[token], detokenize=False, **sampling)
    logprobs = (await generate(context, params)).outputs[0].logprobs
    assert logprobs, "vLLM returned no log-probability for a requested token"
    return logprobs[0][token].logprob


async def prefill_logprobs(generate: Generate, token_ids: list[int], reply: list[int]) -> list[float]:
    """Log-probabilities (nats) of a reply's tokens at T = 1 from one forward pass over all of them."""
    params = SamplingParams(max_tokens=1, top_k=1, prompt_logprobs=0, detokenize=False)
    logprobs = (await generate(token_ids + reply, params)).prompt_logprobs
    assert logprobs, "vLLM returned no prompt log-probabilities"
    steps = [step or {} for step in logprobs[len(token_ids) :]]
    return [step[token].logprob for step, token in zip(steps, reply, strict=True)]


def describe(llm: AsyncLLM, sampling: SamplingParams, prompt: Given, rendering: Rendering) -> dict[str, Any]:
    """The settings that vLLM runs with, the run's sampling parameters, and a prompt as token ids of the engine's own
    tokenizer, written as the run writes it."""
    c = llm.vllm_config
    model = c.model_config
    tokenizer: Any = llm.get_tokenizer()
    # As vLLM does with every request that it takes.
    sampling.update_from_generation_config(model.try_get_generation_config(), tokenizer.eos_token_id)
    sampling.update_from_tokenizer(tokenizer)
    stops = sorted(i for i in sampling.all_stop_token_ids if i < model.get_vocab_size())
    forbidden = Forbidden(
        min_tokens=sampling.min_tokens,
        stop_ids=tuple(stops),
        words=tuple(tuple(word) for word in sampling.bad_words_token_ids or ()),
    )
    return {
        "logprobs_mode": model.logprobs_mode,
        "dtype": str(model.dtype).removeprefix("torch."),
        "head_dtype": str(model.head_dtype).removeprefix("torch."),
        "tied": bool(getattr(model.hf_text_config, "tie_word_embeddings", False)),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": max(sampling.top_k, 0),
        "min_p": sampling.min_p,
        "forbidden": forbidden.facts(),
        "penalties": [sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty - 1.0],
        "logit_bias": dict(sampling.logit_bias or {}),
        "allowed_token_ids": sampling.allowed_token_ids,
        "ignore_eos": bool(sampling.ignore_eos),
        "architecture": architecture(model.hf_text_config.to_dict()),
        "block_size": c.cache_config.block_size,
        "kv_cache_dtype": str(c.cache_config.cache_dtype),
        "quantization": model.quantization,
        "async_scheduling": bool(c.scheduler_config.async_scheduling),
        "prefix_caching": bool(c.cache_config.enable_prefix_caching),
        "eager": bool(model.enforce_eager),
        "sampling_mask": bool(model.return_sampling_mask),
        "generation_config": model.generation_config,
        "stop_ids": stops,
        "vocabulary": len(tokenizer),
        "chat_template": tokenizer.chat_template,
        "prompt": encode(tokenizer, prompt, rendering),
    }


async def trace(generate: Generate, call_workers: CallWorkers, token_ids: list[int]) -> list[dict[str, Any]]:
    """What every layer takes in and gives out for one prompt and a few sampled tokens, by worker.

    Each has the prompt, the reply, and the layers as `rollout.trace` records them. Uses no cached prefix.
    """
    await call_workers(WorkerExtension.begin_trace)
    params = SamplingParams(
        max_tokens=TRACED_REPLY, top_k=1, ignore_eos=True, detokenize=False, skip_reading_prefix_cache=True
    )
    output = await generate(token_ids, params)
    ids = {"prompt": list(token_ids), "reply": list(output.outputs[0].token_ids)}
    return [ids | {"layers": layers} for layers in await call_workers(WorkerExtension.end_trace)]


async def trace_sampler(sample: Sample, call_workers: CallWorkers) -> SampledAndTraced:
    """One reply, and what each worker's sampler did for it."""
    await call_workers(WorkerExtension.begin_sampler_trace)
    try:
        [completion] = await sample()
    finally:
        traces = await call_workers(WorkerExtension.end_sampler_trace)
    return completion, traces
