"""What would explain that an engine's layer gives other values than ours on the same input?"""

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from rl.parity.body import fits
from rl.parity.evidence import Kind
from rl.parity.guesses.guess import Hypothesis
from trainer.model.head import LogprobHead
from trainer.model.lora import NAME

DTYPE_CAUSES: dict[Kind, str] = {"linear": "dtype", "embedding": "dtype", "norm": "norm_dtype", "head": "head_dtype"}
SCALE_CAUSES: dict[Kind, str] = {"linear": "scale", "embedding": "embedding", "norm": "scale", "head": "scale"}


def apply(module: Any, given: Tensor, weight: Tensor | None = None, **changes: Any) -> Tensor:
    """A layer's output as fp32, perhaps with another weight. `changes` replace its attributes. Needs gathered
    parameters."""
    weight = module.weight if weight is None else weight
    if isinstance(module, nn.Linear) or is_router(module):
        return F.linear(given.to(weight.dtype), weight, getattr(module, "bias", None)).float()
    if isinstance(module, nn.Embedding):
        return F.embedding(given, weight).float()
    # `forward` of a copy, without a call: DeepSpeed's hooks on the module need the module's own parameters.
    stand_in = copy(module)
    stand_in._parameters = dict(module._parameters) | {"weight": nn.Parameter(weight, requires_grad=False)}
    for name, value in changes.items():
        setattr(stand_in, name, value)
    if isinstance(stand_in, LogprobHead):
        return stand_in.logits(given, stand_in.dtype)
    return stand_in.forward(given.to(weight.dtype)).float()


def is_router(module: Any) -> bool:
    """Whether a module is a matrix, and gives more than a product: the router of experts. Engines give the product."""
    matrix = module.weight.dim() == 2
    return matrix and not isinstance(module, (nn.Linear, nn.Embedding, LogprobHead))


def explain_layer(module: Any, plain: Any, kind: Kind, given: Tensor, theirs: Tensor, mine: Tensor) -> list[Hypothesis]:
    """Guesses with the error that each leaves. `plain` is the layer as engines have it. Needs gathered parameters."""
    found = [*_rounded(plain, kind, given, theirs, mine)]
    if kind == "norm":
        found += _norm(plain, given, theirs)
    if kind in ("linear", "head"):
        for text, weight in fits.grids(plain.weight.detach().float()):
            out = apply(plain, given, weight.to(plain.weight.dtype))
            found.append(_guess("quantization", f"its weight is {text}", theirs, out))
        for text, rounded in fits.tokens(given.float()):
            out = apply(plain, rounded.to(given.dtype))
            found.append(_guess("quantization", f"what goes into it is {text}", theirs, out))
    if kind == "head" and not plain.mapped.plain:
        product = plain.product(given, plain.dtype)
        without = {"soft cap": replace(plain.mapped, cap=None), "scale": replace(plain.mapped, scale=1.0)}
        for text, mapped in without.items():
            if mapped != plain.mapped:
                out = mapped.apply_(product.clone())
                found.append(_guess("config", f"it leaves out the {text} of the logits", theirs, out))
    if getattr(plain, "bias", None) is not None and kind == "linear":
        found.append(_guess("tensor_loaded", "it leaves out its bias", theirs, mine - plain.bias.float()))
    if hasattr(module, "base_layer"):
        found += _adapter(module, given, theirs)
    return found


def _rounded(plain: Any, kind: Kind, given: Tensor, theirs: Tensor, mine: Tensor) -> Iterator[Hypothesis]:
    for guess in fits.outputs(theirs, mine):
        yield replace(guess, cause=(SCALE_CAUSES if guess.cause == "scale" else DTYPE_CAUSES)[kind])
    for name, dtype in list(fits.FORMATS.items())[:2]:
        weight = fits.rounded(plain.weight.detach(), name)
        out = apply(plain, given, weight)
        yield _guess(DTYPE_CAUSES[kind], f"it agrees once its weight is rounded to {name}", theirs, out)
        text = f"it agrees once its weight and its output are rounded to {name}"
        yield _guess(DTYPE_CAUSES[kind], text, theirs, fits.rounded(out, name))
        if kind == "head":
            out = plain.logits(given, dtype)
            yield _guess("head_dtype", f"it agrees with the product in {name}", theirs, out)
            text = f"it agrees with the product in {name}, rounded"
            yield _guess("head_dtype", text, theirs, fits.rounded(out, name))
        elif kind == "norm":
            text = f"it agrees once its input, weight and output are rounded to {name}"
            out = fits.rounded(apply(plain, fits.rounded(given, name), weight), name)
            yield _guess("norm_dtype", text, theirs, out)


def _norm(plain: Any, given: Tensor, theirs: Tensor) -> Iterator[Hypothesis]:
    for attribute in ("variance_epsilon", "eps"):
        own = getattr(plain, attribute, None)
        if isinstance(own, float):
            power, _ = fits.minimum(
                lambda x, a=attribute: fits.error(theirs, apply(plain, given, **{a: 10**x})),
                [x / 2 for x in range(-24, 2)],
            )
            text = f"its eps is {10**power:.2g}, the trainer's {own:.2g}"
            yield _guess("eps", text, theirs, apply(plain, given, **{attribute: 10**power}))
    centred = given.float() - given.float().mean(dim=-1, keepdim=True)
    yield _guess("norm", "it subtracts the mean first", theirs, apply(plain, centred.to(given.dtype)))
    for text, weight in (("1 + its weight", plain.weight + 1), ("its weight - 1", plain.weight - 1)):
        yield _guess("tensor_loaded", f"it multiplies by {text}", theirs, apply(plain, given, weight.detach()))


def _adapter(module: Any, given: Tensor, theirs: Tensor) -> Iterator[Hypothesis]:
    """How often does the adapter count? Needs an adapter that adds something."""
    base = apply(module.base_layer, given)
    a, b = (x[NAME].weight.detach().float() for x in (module.lora_A, module.lora_B))
    added = F.linear(F.linear(given.float(), a), b) * module.scaling[NAME]
    if added.any():
        times = fits.factor(theirs - base, added)
        text = f"its adapter counts {times:.3g} times" if abs(times) > 5e-3 else "its adapter is not merged"
        yield _guess("lora_scale", text, theirs, base + times * added)


def _guess(cause: str, text: str, theirs: Tensor, out: Tensor) -> Hypothesis:
    return Hypothesis(cause=cause, text=text, residual=fits.error(theirs, out))
