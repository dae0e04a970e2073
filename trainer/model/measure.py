"""Which function is between a model's lm_head and its logits? Measured on its own forward pass, for any family."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from trainer.model.logits import LogitsMap

TINY = 2.0**-20
"""A logit so small that a soft cap does not bend it, and a power of two, by which division is exact."""
HUGE = 2.0**60
"""A logit that every soft cap cuts to its limit."""
GRID = (-40.0, -5.0, -1.0, 0.0, 0.5, 3.0, 25.0, 100.0)
"""Logits at which the measured function must be the model's own."""
TOLERANCE = 1e-5
"""Largest relative difference there."""


def measure(hf: PreTrainedModel) -> LogitsMap:
    """The function between a model's lm_head and its logits, found without its weights: body and head are replaced by
    constants for one forward call.

    Raises ValueError, with the size of the difference, for a model that does anything else than scale and cap.
    """
    name = hf.config.get_text_config().model_type
    width = hf.config.get_text_config().hidden_size
    probes = torch.tensor([TINY, HUGE, *GRID])
    # A model may clip or look up more than one vocabulary entry, so each probe is a position and fills its row.
    vocabulary = hf.get_output_embeddings().weight
    columns = int(getattr(vocabulary, "ds_shape", vocabulary.shape)[0])
    answers = probes[:, None].expand(-1, columns)[None].contiguous()
    hidden = torch.linspace(-1.0, 1.0, len(probes) * width).reshape(1, len(probes), width)
    head = _StandIn(answers, hf.get_output_embeddings())
    body = _StandIn(_Output(last_hidden_state=hidden), hf.get_decoder())
    with _replaced(hf, body=body, head=head), torch.no_grad():
        logits: Tensor = hf(input_ids=torch.zeros(1, len(probes), dtype=torch.long), use_cache=False).logits
    got = logits[0, :, 0].double()
    seen = head.seen
    if seen is None or not torch.equal(seen.float(), hidden):
        raise ValueError(f"{name} changes hidden states between its body and its lm_head, which the trainer leaves out")
    scale, limit = got[0].item() / TINY, got[1].item()
    linear = abs(limit - scale * HUGE) <= TOLERANCE * abs(limit)
    found = LogitsMap(scale=scale, cap=None if linear else abs(limit))
    ours = found.apply_(probes.double())
    gap = ((ours - got).abs() / ours.abs().clamp(min=1.0))[2:].max().item()
    if not gap <= TOLERANCE or not torch.equal(logits, logits[..., :1].expand_as(logits)):
        raise ValueError(
            f"{name} changes its logits after the lm_head by more than a scale and a soft cap (relative difference "
            f"{gap:.1e}), and the trainer computes only these: its log-probabilities would be wrong"
        )
    return found


@dataclass
class _Output(MoeModelOutputWithPast):
    """What any body returns; families read different fields of it."""

    cross_attentions: Any = None
    cache_params: Any = None


class _StandIn(nn.Module):
    """A module that returns a constant, remembers its first argument, and has the attributes of the real module."""

    def __init__(self, answer: Any, real: nn.Module) -> None:
        super().__init__()
        self.answer, self.seen = answer, None
        # Not as an attribute: it would be registered as a submodule.
        object.__setattr__(self, "real", real)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "real"), name)

    def forward(self, given: Any = None, *_: Any, **__: Any) -> Any:
        self.seen = given
        return self.answer


@contextmanager
def _replaced(hf: PreTrainedModel, *, body: nn.Module, head: nn.Module) -> Iterator[None]:
    """The model with another body and another head."""
    kept_head, kept_body = hf.get_output_embeddings(), hf.get_decoder()
    holder, name = next(
        (parent, key) for parent in hf.modules() for key, child in parent.named_children() if child is kept_body
    )
    setattr(holder, name, body)
    hf.set_output_embeddings(head)
    try:
        yield
    finally:
        hf.set_output_embeddings(kept_head)
        setattr(holder, name, kept_body)
