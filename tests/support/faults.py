"""Faults that can be planted in a running engine and mended again, each a real one: the engine then errs by itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

import rollout.weights.receive
from live import Live
from rl.types import Completion
from rollout.head import forget_heads, packed
from rollout.weights.twin import Twin
from rollout.worker import WorkerExtension


class FaultyExtension(WorkerExtension):
    """The worker's side: `plant(name)` breaks it, `mend()` undoes that."""

    def plant(self, name: str, tensor: str = "") -> None:
        model = self.weight_transfer_engine.model
        sampler, logits = self.model_runner.sampler, model.logits_processor
        commit = Twin.commit
        load, mode, head_dtype = type(model).load_weights, sampler.logprobs_mode, logits.head_dtype

        def undo() -> None:
            Twin.commit = commit
            type(model).load_weights, logits.head_dtype = load, head_dtype
            sampler.logprobs_mode = sampler.topk_topp_sampler.logprobs_mode = mode
            rollout.weights.receive.forget_heads = forget_heads
            forget_heads(model)

        self.undo = undo
        change: Callable[[torch.Tensor], torch.Tensor] = {
            "scaled": lambda t: t * 1.02,
            "norm in bf16": lambda t: t.bfloat16().to(t.dtype),
        }.get(name, lambda t: t)
        changed = ((lambda n: n == tensor), (lambda n: "layernorm" in n))[name == "norm in bf16"]

        def faulty(self: Any, weights: Any) -> Any:
            return load(self, [(n, change(t) if changed(n) else t) for n, t in weights])

        def forgetful(self: Any) -> None:
            left_out = self.model.get_submodule(tensor.removesuffix(".weight"))
            self.pairs = [pair for pair in self.pairs if pair[1] is not left_out]
            commit(self)

        type(model).load_weights = faulty
        if name == "not synced":
            Twin.commit = forgetful
        if name == "raw":
            sampler.logprobs_mode = sampler.topk_topp_sampler.logprobs_mode = "raw_logprobs"
        if name == "bf16 head":
            logits.head_dtype = torch.bfloat16
            forget_heads(model)
        if name == "stale head":
            rollout.weights.receive.forget_heads = lambda model: None
            logits.head = packed(model.lm_head.weight.detach()[: logits.org_vocab_size].clone())

    def mend(self) -> None:
        self.undo()


@contextmanager
def in_worker(live: Live, name: str, tensor: str = "") -> Iterator[None]:
    """A fault inside the engine's worker process."""
    live.wait(live.engine.llm.collective_rpc("plant", args=(name, tensor)))
    try:
        yield
    finally:
        live.wait(live.engine.llm.collective_rpc("mend"))


@contextmanager
def in_sampling(live: Live, **changes: Any) -> Iterator[None]:
    """The engine samples with other parameters than it says."""
    one = live.engine._complete
    live.engine._complete = lambda token_ids, **sampling: one(token_ids, **(sampling | changes))
    try:
        yield
    finally:
        del live.engine._complete


@contextmanager
def in_completions(live: Live, change: Callable[[Completion], Completion]) -> Iterator[None]:
    """What the engine sampled is handed on otherwise."""
    one = live.engine._complete

    async def changed(token_ids: list[int], **sampling: Any) -> Completion:
        return change(await one(token_ids, **sampling))

    live.engine._complete = changed
    try:
        yield
    finally:
        del live.engine._complete


def shifted(c: Completion) -> Completion:
    """Every number one token late."""
    return replace(c, logprobs=[c.logprobs[0], *c.logprobs[:-1]])


def without_eos(c: Completion) -> Completion:
    """The token that ended the reply is not handed on."""
    if c.finish_reason != "stop" or len(c.token_ids) < 2:
        return c
    return replace(c, token_ids=c.token_ids[:-1], logprobs=c.logprobs[:-1], versions=c.versions[:-1])


@contextmanager
def without_salt(live: Live) -> Iterator[None]:
    """The prefix cache does not know about weight versions."""
    llm = live.engine.llm
    generate = llm.generate
    llm.generate = lambda prompt, *args, **kwargs: generate(prompt | {"cache_salt": "same"}, *args, **kwargs)
    try:
        yield
    finally:
        del llm.generate


@contextmanager
def with_template(live: Live, template: str) -> Iterator[None]:
    """The engine's tokenizer has another chat template."""
    tokenizer = live.engine.llm.get_tokenizer()
    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        yield
    finally:
        tokenizer.chat_template = before


class Stale:
    """Sends a learner's weights as they were when this was made, with digests that agree with what is sent."""

    def __init__(self, weights: Any) -> None:
        self.weights = weights
        self.tensors = {name: tensor.clone() for name, tensor in weights}

    def metadata(self) -> Any:
        return self.weights.metadata()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        from rl.weights import digest

        self.weights.digests = {name: digest(tensor) for name, tensor in self.tensors.items()}
        yield from self.tensors.items()
