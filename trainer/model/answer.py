"""What does the policy's forward pass return? A tuple, because DeepSpeed looks for tensors in no other class.

It hangs what must happen before a backward pass on the tensors that a module returns. Where it finds none, ZeRO 1 in
bf16 adds the gradients of all earlier micro-batches again with each new one.
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from rl.types import PolicyOutput


class Answer(NamedTuple):
    """The numbers of `rl.types.PolicyOutput`: nats at every column of a mask, 0 elsewhere."""

    logprobs: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"] | None = None

    def output(self) -> PolicyOutput:
        """The same, as objectives get it."""
        return PolicyOutput(**self._asdict())
