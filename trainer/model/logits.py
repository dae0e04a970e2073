"""What does a model do to its logits after the lm_head? A scale and a soft cap, and the gradient through both."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LogitsMap:
    """From the product of the lm_head to the model's logits: y = cap tanh(scale x / cap), or scale x without a cap.

    Gemma-2 has a cap, Granite and Cohere a scale; most models have neither.
    """

    scale: float = 1.0
    cap: float | None = None

    @property
    def plain(self) -> bool:
        """Whether logits stay as they are."""
        return self.scale == 1.0 and self.cap is None

    def apply_(self, logits: Float[Tensor, "*N V"]) -> Float[Tensor, "*N V"]:
        """Change logits in place, and return them."""
        if self.cap is not None:
            return logits.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        return logits if self.scale == 1.0 else logits.mul_(self.scale)

    def backward_(self, grad: Float[Tensor, "N V"], logits: Float[Tensor, "N V"] | None) -> Float[Tensor, "N V"]:
        """Turn a gradient of the mapped logits into one of the lm_head's product, in place. `logits` are the mapped
        ones; they are overwritten, and only a cap needs them."""
        if self.cap is not None:
            assert logits is not None
            slope = logits.div_(self.cap).square_().neg_().add_(1.0)
            grad = grad.mul_(slope)
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


PLAIN = LogitsMap()
"""Logits stay as they are."""
