"""Ten faults that were written without reading the doctor."""

import math
import string
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

import rl.batch
from pair import Pair
from planted_body import attentions
from planted_engine import reads
from planted_fault import add
from planted_sent import perturbed, sends
from planted_worker import in_engine, named, wrapped
from rl.types import Completion
from trainer.model.attention import Segment

# -- sampler, inside the engine's process


@contextmanager
def noise_repeats(worker: Any) -> Iterator[None]:
    """A request's random generator is made anew from its seed at every token: all tokens of a reply get one noise."""

    def drawn(one: Any, logits: Any, generators: dict[int, torch.Generator], *args: Any) -> Any:
        anew = {row: torch.Generator().manual_seed(g.initial_seed()) for row, g in generators.items()}
        return one(logits, anew, *args)

    with wrapped(worker.model_runner.sampler.topk_topp_sampler, "forward", drawn):
        yield


@contextmanager
def pairs_come_once(worker: Any) -> Iterator[None]:
    """No pair of adjacent tokens comes twice in a reply: `no_repeat_ngram_size=2` of a model's generation config."""
    batch = worker.model_runner.input_batch

    def banned(one: Any, logits: Any, *args: Any) -> Any:
        for row, reply in enumerate(batch.req_output_token_ids[: len(logits)]):
            again = [after for before, after in pairwise(reply or []) if before == reply[-1]]
            logits[row, again] = -torch.inf
        return one(logits, *args)

    with wrapped(worker.model_runner.sampler, "apply_logits_processors", banned):
        yield


# -- numbers


@contextmanager
def first_half_scored_again(pair: Pair) -> Iterator[None]:
    """A reply was interrupted half way and went on as a prompt: the numbers of its first half are prompt_logprobs,
    which vLLM computes without temperature."""
    engine = pair.live.engine
    one = engine._complete

    async def resumed(token_ids: list[int], **sampling: Any) -> Completion:
        c = await one(token_ids, **sampling)
        half = len(c.token_ids) // 2
        if half == 0:
            return c
        first = await engine.prefill(token_ids, c.token_ids[:half])
        return replace(c, logprobs=[*first, *c.logprobs[half:]])

    with patch.object(engine, "_complete", resumed):
        yield


@contextmanager
def numbers_padded_in_front(pair: Pair) -> Iterator[None]:
    """A batch pads its tokens behind and its numbers in front: they fit in the longest row alone."""
    one = rl.batch._pad

    def pad(rows: list[list[Any]], length: int, value: int | float, dtype: torch.dtype) -> torch.Tensor:
        if dtype == torch.float32:
            rows = [[*[value] * (length - len(row)), *row] for row in rows]
        return one(rows, length, value, dtype)

    with patch.object(rl.batch, "_pad", pad):
        yield


# -- prompts

CLOSE = 3 + string.printable.index("]")
"""The token that ends a message in the exam's template."""


def user_before_system(ids: list[int]) -> list[int]:
    """The first two messages of a prompt have changed places."""
    ends = [i + 1 for i, token in enumerate(ids) if token == CLOSE][:2]
    if len(ends) < 2:
        return ids
    return [*ids[ends[0] : ends[1]], *ids[: ends[0]], *ids[ends[1] :]]


# -- wire


@contextmanager
def sends_running_average(pair: Pair, decay: float) -> Iterator[None]:
    """The weights that are sent are a running average over versions, as for evaluation."""
    average = {name: tensor.float().clone() for name, tensor in pair.learner.weights}

    def averaged(name: str, tensor: torch.Tensor) -> torch.Tensor:
        average[name] = decay * average[name] + (1 - decay) * tensor.float()
        return average[name].to(tensor.dtype)

    with perturbed(pair, 4), sends(pair, averaged):
        yield


# -- the engine's body


@contextmanager
def rope_in_pairs(worker: Any) -> Iterator[None]:
    """The rotary embedding turns neighbouring features (GPT-J), not the two halves of a head (GPT-NeoX)."""
    with ExitStack() as stack:
        for rotary in named(worker, "rotary_emb"):
            stack.enter_context(patch.object(rotary, "is_neox_style", not rotary.is_neox_style))
        yield


@contextmanager
def large_batches_differ(worker: Any, most: int, factor: float) -> Iterator[None]:
    """Where more than so many requests attend in one step, another kernel runs, whose scale is wrong."""

    def attend(impl: Any) -> Any:
        def changed(one: Any, layer: Any, q: Any, k: Any, v: Any, cache: Any, metadata: Any, **more: Any) -> Any:
            large = metadata is not None and len(metadata.seq_lens) > most
            with patch.object(impl, "scale", impl.scale * (factor if large else 1.0)):
                return one(layer, q, k, v, cache, metadata, **more)

        return changed

    with ExitStack() as stack:
        for layer in attentions(worker):
            stack.enter_context(wrapped(layer.impl, "forward", attend(layer.impl)))
        yield


# -- the trainer


@contextmanager
def noisy_embedding(pair: Pair, alpha: float) -> Iterator[None]:
    """The noise of NEFTune, which belongs to finetuning, is still added to the embedding."""

    def noisy(module: Any, inputs: Any, out: torch.Tensor) -> torch.Tensor:
        most = alpha / math.sqrt(out.shape[-2] * out.shape[-1])
        return out + torch.empty_like(out).uniform_(-most, most)

    hook = pair.learner.parts.policy.hf.get_input_embeddings().register_forward_hook(noisy)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def sees_its_target(pair: Pair) -> Iterator[None]:
    """The causal mask is one diagonal too high: each column attends to the token that it predicts."""

    def mask(s: Segment) -> torch.Tensor:
        own = torch.block_diag(*[torch.ones(n, n, dtype=torch.bool).tril(1) for n in s.lengths])
        return F.pad(own, (s.prompt_length, 0), value=True)

    with patch.object(Segment, "mask", property(mask)):
        yield


W, T = "engine trainer", "trainer"
repeats = lambda p: in_engine(p.live, noise_repeats)  # noqa: E731
once = lambda p: in_engine(p.live, pairs_come_once)  # noqa: E731
add("sampler", "blind: one noise for all tokens of a reply", "not_drawn seeds", repeats)
add("sampler", "blind: no pair of tokens comes twice", "forbidden penalties", once)
half = "raw_logprobs temperature"
add("numbers", "blind: first half scored as a prompt", half, first_half_scored_again)
add("numbers", "blind: numbers padded in front", "shift padding swapped", numbers_padded_in_front, "driver engine")
add("prompts", "blind: user's message before the system's", "prompt_tokens template", reads(user_before_system))
average = lambda p: sends_running_average(p, 0.9)  # noqa: E731
add("wire", "blind: a running average is sent", "stale_weights tensor_differs", average, W)
in_pairs = lambda p: in_engine(p.live, rope_in_pairs)  # noqa: E731
add("body", "blind: rope turns neighbouring features", "rope config", in_pairs, W)
large = lambda p: in_engine(p.live, large_batches_differ, 8, 1.4)  # noqa: E731
add("body", "blind: attention scale in large batches", "attention_scale attention", large)
noise = lambda p: noisy_embedding(p, 5.0)  # noqa: E731
add("trainer", "blind: noise on the embedding", "mode embedding", noise, T)
ahead = "attention_mask attention packing trainer_body"
add("trainer", "blind: each column sees its target", ahead, sees_its_target, T)
