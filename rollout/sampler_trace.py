"""What an engine's sampler really does with one reply: the logits that it gets, its settings, and what it returns.

The settings of a request do not show this: a processor, a default or another layer may change them on the way.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from vllm.model_executor.layers.logits_processor import LogitsProcessor


@dataclass
class SamplerTrace:
    """Hooks on a vLLM model and its sampler, until `stop`. They see the first request of a batch: ask for one alone."""

    logits: list[Tensor] = field(default_factory=list[Tensor])
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """Of the first token, as the sampler reads them; empty where the sampler is no module (vLLM's GPU runner)."""
    returned: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    """Each sampled token and its number, as the sampler returns them."""
    hooks: list[RemovableHandle] = field(default_factory=list[RemovableHandle])

    def start(self, model: nn.Module, sampler: object) -> None:
        """Watch the model's logits and the sampler."""
        for module in model.modules():
            if isinstance(module, LogitsProcessor):
                self.hooks.append(module.register_forward_hook(self._after_logits))
        if isinstance(sampler, nn.Module):
            self.hooks.append(sampler.register_forward_pre_hook(self._before_sampler, with_kwargs=True))
            self.hooks.append(sampler.register_forward_hook(self._after_sampler))

    def stop(self) -> dict[str, Any]:
        """Remove the hooks; the records as plain values: `logits` is (shape, float32 bytes), [tokens, vocabulary]."""
        for hook in self.hooks:
            hook.remove()
        logits = torch.stack(self.logits) if self.logits else torch.zeros(0, 0)
        plain = logits.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        return {"logits": (list(logits.shape), plain), "settings": self.settings, "returned": self.returned}

    def _after_logits(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and len(output):
            # Cloned because the sampler works in place.
            self.logits.append(output[0].detach().float().clone())

    def _before_sampler(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.settings:
            metadata = next((a for a in (*args, *kwargs.values()) if hasattr(a, "all_greedy")), None)
            self.settings = {} if metadata is None else sampler_settings(metadata)

    def _after_sampler(self, module: nn.Module, args: Any, output: Any) -> None:
        numbers = getattr(output, "logprobs_tensors", None)
        token = int(output.sampled_token_ids[0, 0])
        self.returned.append((token, float("nan") if numbers is None else float(numbers.logprobs[0, 0])))


def sampler_settings(metadata: Any) -> dict[str, Any]:
    """The first request's settings in vLLM's `SamplingMetadata`, each with the value that is off where it is absent.

    Source: vLLM 0.32, `v1/sample/metadata.py` and `v1/sample/logits_processor/builtin.py`.
    """

    def first(tensor: Tensor | None, off: float) -> float:
        return off if tensor is None or not len(tensor) else float(f"{float(tensor[0]):.6g}")

    penalised = not metadata.no_penalties
    allowed = metadata.allowed_token_ids_mask  # True where a token is not allowed
    found: dict[str, Any] = {
        "greedy": bool(metadata.all_greedy),
        "temperature": first(metadata.temperature, 0.0),
        "top_p": first(metadata.top_p, 1.0),
        "top_k": int(first(metadata.top_k, 0)),
        "presence_penalty": first(metadata.presence_penalties, 0.0) if penalised else 0.0,
        "frequency_penalty": first(metadata.frequency_penalties, 0.0) if penalised else 0.0,
        "repetition_penalty": first(metadata.repetition_penalties, 1.0) if penalised else 1.0,
        "tokens_not_allowed": 0 if allowed is None else int(allowed[0].sum()),
        "bad_words": sorted(map(list, metadata.bad_words_token_ids.get(0, []))),
        "min_p": 0.0,
        "logit_bias": {},
        "min_tokens": 0,
        "other_processors": [],
    }
    processors = metadata.logitsprocs
    for one in (*processors.argmax_invariant, *processors.non_argmax_invariant):
        name = type(one).__name__
        if name == "MinPLogitsProcessor":
            found["min_p"] = float(one.get_min_p_by_index(0)) if one.min_p_count else 0.0
        elif name == "LogitBiasLogitsProcessor":
            found["logit_bias"] = {int(token): float(bias) for token, bias in one.biases.get(0, {}).items()}
        elif name == "MinTokensLogitsProcessor":
            found["min_tokens"] = int(one.min_toks[0][0]) if 0 in one.min_toks else 0
        else:
            found["other_processors"].append(name)
    return found
