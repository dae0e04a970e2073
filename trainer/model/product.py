"""How does the head multiply? In fp32 and exactly; with bf16 operands on a GPU, on its tensor cores and without copies.

A product of two bf16 numbers is exact in fp32, and tensor cores add up in fp32. So for bf16 operands they compute what
fp32 cores compute, up to the order of the sum, many times as fast. A gradient in fp32 becomes two bf16 numbers, which
together hold 16 bits of it; the gradient of a bf16 weight keeps 8.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def on_tensor_cores(*operands: Tensor) -> bool:
    """Whether these operands multiply exactly on tensor cores."""
    return all(x.is_cuda and x.dtype == torch.bfloat16 for x in operands)


def operand(weight: Float[Tensor, "V H"], hidden: Float[Tensor, "N H"], dtype: torch.dtype) -> Float[Tensor, "V H"]:
    """The weight as it is multiplied with `hidden` in `dtype`: itself where no copy is needed."""
    return weight if dtype == torch.float32 and on_tensor_cores(weight, hidden) else weight.to(dtype)


def write_product(
    hidden: Float[Tensor, "N H"], w: Float[Tensor, "V H"], dtype: torch.dtype, *, out: Float[Tensor, "N V"]
) -> None:
    """Write hidden @ w.T, multiplied in `dtype`, into `out` (fp32); `w` comes from `operand`."""
    if dtype != torch.float32:
        out.copy_(F.linear(hidden.to(dtype), w))
    elif on_tensor_cores(hidden, w):
        torch.mm(hidden, w.t(), out_dtype=torch.float32, out=out)
    else:
        torch.mm(hidden.float(), w.t(), out=out)


def halves(x: Float[Tensor, "M N"]) -> tuple[Float[Tensor, "M N"], Float[Tensor, "M N"]]:
    """Two bf16 tensors that add up to an fp32 one, up to 2^-17 of each value."""
    high = x.bfloat16()
    return high, (x - high).bfloat16()


def gradients(
    grad: Float[Tensor, "C V"],
    w: Float[Tensor, "V H"],
    hidden: Float[Tensor, "C H"],
    dtype: torch.dtype,
    *,
    add_to: Float[Tensor, "V H"] | None,
) -> Float[Tensor, "C H"]:
    """The gradient of hidden states, in their dtype, from that of the logits. Adds the weight's to `add_to` (fp32)."""
    if dtype == torch.float32 and on_tensor_cores(w, hidden):
        parts = halves(grad)
        if add_to is not None:
            for part in parts:
                torch.addmm(add_to, part.t(), hidden, out_dtype=torch.float32, out=add_to)
        high, low = (torch.mm(part, w, out_dtype=torch.float32) for part in parts)
        return high.add_(low).to(hidden.dtype)
    if add_to is not None:
        add_to.addmm_(grad.t(), hidden.to(dtype).float())
    return grad.to(dtype).matmul(w).to(hidden.dtype)
