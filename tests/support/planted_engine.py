"""Faults of the engine's sampler: in the requests, in the sampler itself, and in what is picked from its samples."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from live import Live
from planted_fault import Plant
from planted_worker import wrapped
from rl.types import Completion
from rollout.settings import sampling_settings

# -- in the requests


@contextmanager
def in_settings(live: Live, **changes: Any) -> Iterator[None]:
    """The engine's sampling parameters are other ones, and the engine reports them."""
    with patch("rollout.engine.sampling_settings", lambda *args: sampling_settings(*args) | changes):
        yield


@contextmanager
def in_requests(live: Live, **changes: Any) -> Iterator[None]:
    """Each request has other parameters than the engine reports."""
    engine = live.engine
    one = engine._complete

    def complete(token_ids: list[int], **sampling: Any) -> Any:
        wanted = sampling | changes
        wanted["min_tokens"] = min(wanted["min_tokens"], wanted["max_tokens"])  # vLLM refuses more
        return one(token_ids, **wanted)

    with patch.object(engine, "_complete", complete):
        yield


@contextmanager
def one_seed(live: Live, seeds: int = 1) -> Iterator[None]:
    """All samples of a group have the same seed, or one of so many."""
    engine = live.engine
    one = engine._complete

    def seeded(token_ids: list[int], **sampling: Any) -> Any:
        return one(token_ids, **(sampling | {"seed": sampling["seed"] % seeds}))

    with patch.object(engine, "_complete", seeded):
        yield


@contextmanager
def best_of(live: Live, n: int) -> Iterator[None]:
    """The likeliest of n samples is handed on."""
    engine = live.engine
    one = engine._complete

    async def best(token_ids: list[int], **sampling: Any) -> Completion:
        lots = [sampling | {"seed": sampling["seed"] + 100_000 * i} for i in range(n)]
        found = await asyncio.gather(*(one(token_ids, **lot) for lot in lots))
        return max(found, key=lambda c: sum(c.logprobs) / len(c.logprobs))

    with patch.object(engine, "_complete", best):
        yield


@contextmanager
def longest_of(live: Live, n: int) -> Iterator[None]:
    """The longest of n samples is handed on: short replies are thrown away."""
    engine = live.engine
    one = engine._complete

    async def longest(token_ids: list[int], **sampling: Any) -> Completion:
        lots = [sampling | {"seed": sampling["seed"] + 100_000 * i} for i in range(n)]
        return max(await asyncio.gather(*(one(token_ids, **lot) for lot in lots)), key=lambda c: len(c.token_ids))

    with patch.object(engine, "_complete", longest):
        yield


# -- in the sampler, inside the engine's process


@contextmanager
def raw_mode(worker: Any) -> Iterator[None]:
    sampler = worker.model_runner.sampler
    with (
        patch.object(sampler, "logprobs_mode", "raw_logprobs"),
        patch.object(sampler.topk_topp_sampler, "logprobs_mode", "raw_logprobs"),
    ):
        yield


@contextmanager
def temperature_applied(worker: Any, times: int) -> Iterator[None]:
    """The sampler divides the logits by the temperature so many times."""

    def apply(one: Any, logits: Any, temperature: Any, all_random: bool) -> Any:
        for _ in range(times):
            logits = one(logits, temperature, all_random)
        return logits

    with wrapped(worker.model_runner.sampler, "apply_temperature", apply):
        yield


@contextmanager
def sampler_truncates(worker: Any, top_k: int | None, top_p: float | None) -> Iterator[None]:
    """The sampler cuts, whatever the request asks for."""

    def cut(one: Any, logits: Any, generators: Any, k: Any, p: Any) -> Any:
        rows = logits.shape[0]
        k = k if top_k is None else torch.full((rows,), top_k, dtype=torch.int32)
        return one(logits, generators, k, p if top_p is None else torch.full((rows,), top_p))

    with wrapped(worker.model_runner.sampler.topk_topp_sampler, "forward", cut):
        yield


@contextmanager
def sampler_shifts_logits(worker: Any, tokens: list[int], by: float) -> Iterator[None]:
    """The sampler adds a number to the logits of some tokens."""

    def shifted(one: Any, logits: Any, *args: Any) -> Any:
        logits[:, tokens] += by
        return one(logits, *args)

    with wrapped(worker.model_runner.sampler, "apply_logits_processors", shifted):
        yield


@contextmanager
def draws_otherwise(worker: Any, factor: float) -> Iterator[None]:
    """Tokens are drawn from logits times a factor; the log-probabilities are those of the logits."""

    def drawn(one: Any, logits: Any, generators: Any, k: Any, p: Any) -> Any:
        reported = logits.log_softmax(-1, dtype=torch.float32)
        return one(logits * factor, generators, k, p)[0], reported

    with wrapped(worker.model_runner.sampler.topk_topp_sampler, "forward", drawn):
        yield


@contextmanager
def draws_the_likeliest(worker: Any) -> Iterator[None]:
    """The likeliest token is taken, and reported with its log-probability at the run's temperature."""

    def drawn(one: Any, logits: Any, *args: Any) -> Any:
        reported = logits.log_softmax(-1, dtype=torch.float32)
        return logits.argmax(-1), reported

    with wrapped(worker.model_runner.sampler.topk_topp_sampler, "forward", drawn):
        yield


@contextmanager
def draws_cut(worker: Any, top_p: float) -> Iterator[None]:
    """Tokens are drawn with top-p, and reported without."""

    def drawn(one: Any, logits: Any, generators: Any, k: Any, p: Any) -> Any:
        reported = logits.log_softmax(-1, dtype=torch.float32)
        return one(logits, generators, k, torch.full((logits.shape[0],), top_p))[0], reported

    with wrapped(worker.model_runner.sampler.topk_topp_sampler, "forward", drawn):
        yield


@contextmanager
def number_of_another(worker: Any, rank: int) -> Iterator[None]:
    """The number of a sampled token is that of the likeliest token (rank 0) or of the runner-up (rank 1)."""

    def gathered(one: Any, logprobs: Any, num_logprobs: int, token_ids: Any) -> Any:
        found = one(logprobs, num_logprobs, token_ids=token_ids)
        numbers = found.logprobs.clone()
        numbers[:, 0] = logprobs.topk(rank + 1, dim=-1).values[:, rank]
        return found._replace(logprobs=numbers)

    with wrapped(worker.model_runner.sampler, "gather_logprobs", gathered):
        yield


@contextmanager
def softmax_in_bf16(worker: Any) -> Iterator[None]:
    """The sampler gets logits that were rounded to bf16."""

    def rounded(one: Any, logits: Any, *args: Any) -> Any:
        return one(logits.bfloat16().float(), *args)

    with wrapped(worker.model_runner.sampler, "apply_logits_processors", rounded):
        yield


# -- prompts: what the engine reads


@contextmanager
def in_prompts(live: Live, change: Any) -> Iterator[None]:
    """The engine computes on other prompt tokens than it was given."""
    llm = live.engine.llm
    one = llm.generate

    def generate(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        return one(prompt | {"prompt_token_ids": change(list(prompt["prompt_token_ids"]))}, *args, **kwargs)

    with patch.object(llm, "generate", generate):
        yield


@contextmanager
def with_tokenizer(live: Live, change: Any) -> Iterator[None]:
    """The engine has another tokenizer."""
    from transformers import AutoTokenizer

    llm = live.engine.llm
    other = AutoTokenizer.from_pretrained(live.config.model)
    change(other)
    with patch.object(llm, "get_tokenizer", lambda: other):
        yield


@contextmanager
def with_stop_ids(live: Live, ids: list[int]) -> Iterator[None]:
    """The engine ends replies at other tokens."""
    with patch.object(live.engine, "stop_ids", ids):
        yield


@contextmanager
def with_salt(live: Live, salt: str) -> Iterator[None]:
    """The prefix cache does not know about weight versions."""
    llm = live.engine.llm
    one = llm.generate

    def generate(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        return one(prompt | {"cache_salt": salt}, *args, **kwargs)

    with patch.object(llm, "generate", generate):
        yield


# -- plants


def asks(**changes: Any) -> Plant:
    return lambda pair: in_requests(pair.live, **changes)


def reports(**changes: Any) -> Plant:
    return lambda pair: in_settings(pair.live, **changes)


def reads(change: Callable[[list[int]], list[int]]) -> Plant:
    return lambda pair: in_prompts(pair.live, change)


def tokenizer(change: Callable[[Any], Any]) -> Plant:
    return lambda pair: with_tokenizer(pair.live, change)
