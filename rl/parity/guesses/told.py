"""Sampled tokens, the logits that they came from, and the numbers that somebody returned for them."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rl.batch import integers
from rl.sampling.forbidden import Forbidden, named
from rl.sampling.truncation import Truncation, keep
from rl.types import Batch

TOKENS = 256
"""At most so many tokens are looked at with all their logits: [256, 150,000] in fp32 are 150 MB."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """N sampled tokens in the order of rows and columns, the whole vocabulary's logits, and returned numbers."""

    logits: Float[Tensor, "N V"]
    """At temperature 1, before any cut."""
    reported: Float[Tensor, " N"]
    """Log-probabilities in nats, if all is well."""
    input_ids: Int[Tensor, "B S"]
    rows: Int[Tensor, " N"]
    """Of the batch."""
    columns: Int[Tensor, " N"]
    """Column t predicts the token in column t + 1 of `input_ids`."""
    groups: Int[Tensor, " B"]
    temperature: float
    truncation: Truncation | None
    forbidden: Int[Tensor, "N F"] | None = None
    """Ids that may not be sampled at each place, padded with -1."""
    support: Int[Tensor, "N K"] | None = None
    """Ids that truncation kept, as an engine reported them, padded with -1."""

    @cached_property
    def targets(self) -> Int[Tensor, " N"]:
        """The sampled tokens."""
        return self.input_ids[self.rows, self.columns + 1]

    @cached_property
    def log_p(self) -> Float[Tensor, "N V"]:
        """Log-probabilities (nats) of the distribution that the run samples from."""
        return self.under(self.temperature, self.truncation)

    @cached_property
    def expected(self) -> Float[Tensor, " N"]:
        """The right numbers."""
        return self.log_p.gather(1, self.targets[:, None])[:, 0]

    def under(
        self, temperature: float, truncation: Truncation | None, forbids: bool = True, logits: Tensor | None = None
    ) -> Float[Tensor, "N V"]:
        """Log-probabilities (nats) with other settings. The sampled token always counts as kept."""
        scaled = (self.logits if logits is None else logits) / temperature
        if forbids and self.forbidden is not None:
            mask = named(self.forbidden, scaled).scatter(1, self.targets[:, None], False)
            scaled = scaled.masked_fill(mask, -torch.inf)
        if truncation is not None:
            kept = named(self.support, scaled) if self.support is not None else keep(scaled, truncation)
            scaled = scaled.masked_fill(~kept.scatter(1, self.targets[:, None], True), -torch.inf)
        return scaled.log_softmax(-1)

    def left(self, log_p: Float[Tensor, "N V"]) -> float:
        """Mean |d| in nats that remains if `log_p` is the distribution."""
        return self.remains(log_p.gather(1, self.targets[:, None])[:, 0])

    def remains(self, numbers: Float[Tensor, " N"]) -> float:
        """Mean |d| in nats that remains if these were the right numbers."""
        return float((numbers - self.reported).abs().mean())

    def replies(self) -> list[slice]:
        """Where each row's tokens are."""
        new = self.rows.diff(prepend=self.rows[:1] - 1).nonzero()[:, 0]
        starts = [*integers(new), len(self.rows)]
        return [slice(start, end) for start, end in pairwise(starts)]


def told(
    batch: Batch,
    logits: Float[Tensor, "N V"],
    reported: Float[Tensor, "B T"],
    *,
    temperature: float,
    truncation: Truncation | None,
    forbidden: Forbidden | None,
) -> Told:
    """The masked tokens of a batch, with their logits in the batch's order."""
    rows, columns = batch.mask.nonzero(as_tuple=True)
    return Told(
        logits=logits,
        reported=reported[batch.mask],
        input_ids=batch.input_ids,
        rows=rows,
        columns=columns,
        groups=batch.group_ids,
        temperature=temperature,
        truncation=truncation,
        forbidden=None if forbidden is None else forbidden.ids(batch.input_ids, batch.mask),
        support=None if batch.support is None else batch.support[batch.mask],
    )
