"""Ten more faults that were written without reading the doctor.

The names after each fault were written before any of them was run. One of them is a guess at its meaning: "condition"
is read as "right alone, wrong in company".
"""

import math
import string
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from vllm.forward_context import get_forward_context

from pair import Pair
from planted_body import attentions, norms
from planted_engine import in_prompts, with_tokenizer
from planted_fault import add
from planted_sent import perturbed, sends
from planted_worker import every, in_engine, model_of, named, wrapped
from trainer.model.answer import Answer

# -- sampler and numbers, inside the engine's process


@contextmanager
def drafts_accepted(worker: Any, least: float) -> Iterator[None]:
    """Speculative decoding with "typical acceptance": the draft is the token that followed the last token where it
    stood before in the reply, and is taken wherever the model gives it a probability of `least`."""
    batch = worker.model_runner.input_batch

    def drawn(one: Any, logits: Any, *args: Any) -> Any:
        sampled, reported = one(logits, *args)
        sampled = sampled.clone()
        for row, reply in enumerate(batch.req_output_token_ids[: len(sampled)]):
            drafts = [after for before, after in pairwise(reply or []) if before == reply[-1]]
            if drafts and reported[row, drafts[-1]] > math.log(least):
                sampled[row] = drafts[-1]
        return sampled, reported

    with wrapped(worker.model_runner.sampler.topk_topp_sampler, "forward", drawn):
        yield


@contextmanager
def copied_too_early(worker: Any, every_so_many: int) -> Iterator[None]:
    """A race: every so many steps, the numbers leave their buffer before those of the step have been copied into it.
    They are those of the step before, if that had as many rows."""
    steps, last = 0, torch.empty(0)

    def gathered(one: Any, logprobs: Any, num_logprobs: int, token_ids: Any) -> Any:
        nonlocal steps, last
        found = one(logprobs, num_logprobs, token_ids=token_ids)
        steps, old, last = steps + 1, last, found.logprobs.clone()
        early = steps % every_so_many == 0 and old.shape == last.shape
        return found._replace(logprobs=old) if early else found

    with wrapped(worker.model_runner.sampler, "gather_logprobs", gathered):
        yield


# -- tokenizer

LOWER = {3 + string.printable.index(c): 3 + string.printable.index(c.lower()) for c in string.ascii_uppercase}


@contextmanager
def lower_case(pair: Pair) -> Iterator[None]:
    """The engine gets text, and its tokenizer has a normaliser that the driver's has not: all becomes lower case."""
    from tokenizers import normalizers

    def normalised(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()

    with with_tokenizer(pair.live, normalised), in_prompts(pair.live, lambda ids: [LOWER.get(i, i) for i in ids]):
        yield


# -- wire


def decodes() -> bool:
    """Whether this step computes one token of each request, which a captured graph would do."""
    metadata: Any = get_forward_context().attn_metadata
    metadata = next(iter(metadata.values())) if isinstance(metadata, dict) else metadata
    return metadata is not None and int(metadata.max_query_len) == 1


@contextmanager
def graph_over_old_weights(worker: Any) -> Iterator[None]:
    """Decoding replays graphs that were captured over the tensors of before the update; prompts and head are new."""
    model = model_of(worker)
    kept = {"_modules", "forward"}
    old = [(m, {k: v for k, v in m.__dict__.items() if k not in kept}) for m in model.modules()]

    def replayed(one: Any, *args: Any, **kwargs: Any) -> Any:
        if not decodes():
            return one(*args, **kwargs)
        new = [(m, {k: m.__dict__[k] for k, v in then.items() if m.__dict__.get(k) is not v}) for m, then in old]
        for (m, now), (_, then) in zip(new, old, strict=True):
            m.__dict__.update({k: then[k] for k in now})
        try:
            return one(*args, **kwargs)
        finally:
            for m, now in new:
                m.__dict__.update(now)

    with wrapped(model.model, "forward", replayed):
        yield


@contextmanager
def mlp_adapters_left_out(pair: Pair) -> Iterator[None]:
    """Only the adapters of attention are merged when weights are sent: a list of target modules is too short."""
    adapted = pair.learner.weights.adapted

    def change(name: str, tensor: Any) -> Any:
        return adapted[name].base_layer.weight.detach() if ".mlp." in name and name in adapted else tensor

    with sends(pair, change):
        yield


# -- the engine's body


@contextmanager
def activations_in_fp8(worker: Any) -> Iterator[None]:
    """What goes into the linear layers is quantised to fp8, with a scale for each token; the weights are not."""

    def quantised(one: Any, x: Any, *args: Any) -> Any:
        scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
        return one(((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype), *args)

    with ExitStack() as stack:
        for ending in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            stack.enter_context(every(named(worker, ending), "forward", quantised))
        yield


@contextmanager
def block_tables_mixed_up(worker: Any) -> Iterator[None]:
    """In decoding, every fourth request of a batch reads the KV blocks of the request before it."""

    def attend(one: Any, layer: Any, q: Any, k: Any, v: Any, cache: Any, metadata: Any, *args: Any, **more: Any) -> Any:
        if metadata is None or int(metadata.max_query_len) != 1:
            return one(layer, q, k, v, cache, metadata, *args, **more)
        rows = torch.arange(len(metadata.block_table))
        table = metadata.block_table[torch.where(rows % 4 == 3, rows - 1, rows)].contiguous()
        with patch.object(metadata, "block_table", table):
            return one(layer, q, k, v, cache, metadata, *args, **more)

    with every([layer.impl for layer in attentions(worker)], "forward", attend):
        yield


@contextmanager
def mean_subtracted(worker: Any) -> Iterator[None]:
    """The norms are LayerNorms: they subtract the mean first."""

    def normed(one: Any, x: Any, residual: Any = None) -> Any:
        whole = x if residual is None else x + residual
        out = one(whole - whole.mean(-1, keepdim=True))
        return out if residual is None else (out, whole)

    with every(norms(worker), "forward", normed):
        yield


# -- the trainer


@contextmanager
def labels_smoothed(pair: Pair, share: float) -> Iterator[None]:
    """The log-probability is that of a cross-entropy with label smoothing, which belongs to finetuning."""
    head = pair.learner.parts.head
    one = head.forward

    def smoothed(hidden: Any, targets: Any = None, temperature: float = 1.0, *args: Any, **kwargs: Any) -> Any:
        if targets is None:
            return one(hidden)
        chosen, entropy = one(hidden, targets, temperature, *args, **kwargs)
        everyone = torch.log_softmax(head.logits(hidden, head.dtype) / temperature, -1).mean(-1)
        return (1 - share) * chosen + share * everyone, entropy

    with patch.object(head, "forward", smoothed):
        yield


@contextmanager
def rows_not_put_back(pair: Pair) -> Iterator[None]:
    """A micro-batch is sorted for its pass, longest row first, and its numbers come back in that order."""
    policy = pair.learner.parts.policy
    one = policy.forward

    def forward(input_ids: Any, mask: Any, *args: Any, **kwargs: Any) -> Answer:
        out = one(input_ids, mask, *args, **kwargs)
        if kwargs.get("plain"):
            return out
        order = (mask * torch.arange(mask.shape[1])).amax(dim=1).argsort(descending=True, stable=True)
        return out._replace(logprobs=out.logprobs[order], entropy=out.entropy[order])

    with patch.object(policy, "forward", forward):
        yield


W, T, LORA = "engine trainer", "trainer", ("qwen2-lora",)
drafts = lambda p: in_engine(p.live, drafts_accepted, 0.05)  # noqa: E731
add("sampler", "blind2: drafts of a lookup accepted without the test", "not_drawn", drafts)
early = lambda p: in_engine(p.live, copied_too_early, 5)  # noqa: E731
add("numbers", "blind2: every fifth number copied too early", "shift swapped", early)
add("prompts", "blind2: lower case in the engine's tokenizer", "tokenizer prompt_tokens", lower_case, "engine driver")
graph = lambda p: in_engine(p.live, graph_over_old_weights)  # noqa: E731
moved = lambda p: perturbed(p, 4)  # noqa: E731
replays = "stale_weights tensor_not_synced"
add("wire", "blind2: decoding replays graphs over the old weights", replays, graph, prepare=moved)
left_out = "lora_scale tensor_differs"
add("wire", "blind2: adapters of the MLP not merged", left_out, mlp_adapters_left_out, W, models=LORA)
fp8 = lambda p: in_engine(p.live, activations_in_fp8)  # noqa: E731
add("body", "blind2: activations in fp8", "quantization dtype", fp8)
tables = lambda p: in_engine(p.live, block_tables_mixed_up)  # noqa: E731
add("body", "blind2: block tables mixed up in decoding", "kv_cache attention condition", tables)
means = lambda p: in_engine(p.live, mean_subtracted)  # noqa: E731
# "norm" is a name that was added after the fault.
add("body", "blind2: norms subtract the mean", "norm eps norm_dtype config", means, W)
smooth = lambda p: labels_smoothed(p, 0.1)  # noqa: E731
add("trainer", "blind2: label smoothing", "unit head", smooth, T)
add("trainer", "blind2: rows of a micro-batch not put back", "swapped packing", rows_not_put_back, T)
