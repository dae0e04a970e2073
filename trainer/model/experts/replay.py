"""Which experts does the trainer send a token to? Those that the engine sent it to: rollout routing replay (R3).

Engine and trainer round differently, so their routers choose different experts for some tokens, and another expert is
another function. With replay the trainer takes the engine's experts and weighs them by its own router, which gets its
gradient from there (arXiv 2510.11370).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

FAMILIES = frozenset({"mixtral", "olmoe", "qwen2_moe", "qwen3_moe"})
"""Families whose router is a softmax over all experts, of which the k largest count, divided by their sum where the
config says so. A test compares each with transformers' own router."""


class RouterReplay:
    """Hooks on a model's routers. They do nothing until `begin`."""

    def __init__(self, hf: PreTrainedModel) -> None:
        text = hf.config.get_text_config()
        self.normed = text.model_type == "mixtral" or text.norm_topk_prob
        self.experts: Tensor | None = None
        self.counting_only = False
        self.counts = torch.zeros(4, dtype=torch.long)
        """Since the last reset: tokens for which some router chooses other experts than the engine, tokens, pairs of
        token and router that differ, pairs."""
        found = [
            (int(re.findall(r"\.(\d+)\.", name)[0]), module)
            for name, module in hf.named_modules()
            if type(module).__name__.endswith("TopKRouter")
        ]
        self.others = torch.zeros(0, len(found), dtype=torch.bool)
        """True where a token's router chooses other experts than the engine's did."""
        for column, (layer, router) in enumerate(found):
            router.register_forward_hook(partial(self._route, column, layer))

    def begin(self, experts: Int[Tensor, "N L K"] | None) -> None:
        """Replay these experts for the N tokens of the next forward pass, and of its backward pass; -1: not known.

        None: every router chooses for itself.
        """
        self.experts = experts
        if experts is not None:
            self.others = torch.zeros(len(experts), self.others.shape[1], dtype=torch.bool, device=experts.device)

    def count(self) -> None:
        """Add what the last forward pass showed to `counts`."""
        if self.experts is None:
            return
        tokens = (self.experts[:, 0, 0] >= 0).sum()
        of = self.others.any(1).sum(), tokens, self.others.sum(), tokens * self.others.shape[1]
        self.counts = self.counts.to(self.experts.device) + torch.stack(of)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Only count: every router chooses for itself."""
        self.counting_only = True
        try:
            yield
        finally:
            self.counting_only = False

    def _route(
        self, column: int, layer: int, router: nn.Module, _: Any, output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        logits, scores, own = output
        if self.experts is None:
            return None
        given = self.experts[:, layer].to(own.dtype)
        chosen = torch.where(given >= 0, given, own)
        self.others[:, column] = (chosen.sort(-1).values != own.sort(-1).values).any(-1)
        if self.counting_only:
            return None
        weights = logits.float().softmax(-1).gather(-1, chosen)
        if self.normed:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(scores.dtype), chosen
