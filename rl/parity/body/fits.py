"""Which simple change explains that an engine's layer gives other values than ours on the same input?"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from rl.parity.evidence import LayerError
from rl.parity.guesses.guess import Hypothesis

LAYER_ERROR = {"float32": 1e-4, "bfloat16": 1e-2}
"""Largest relative error of a layer, on equal input, at which it counts as equal. Clean runs show 1e-6 and 5e-3."""
SCALE_ERROR = {"float32": 5e-5, "bfloat16": 2e-3}
"""Largest distance of a fitted factor from 1: rounding raises as many values as it lowers."""
LEFT = 0.05
"""A guess is a name when it leaves less than this share of an error."""
FORMATS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8 (e4m3)": torch.float8_e4m3fn,
    "fp8 (e5m2)": torch.float8_e5m2,
}


def differs(layer: LayerError, dtype: str, *, fp32_head: bool) -> bool:
    """Whether a layer computes other values than ours, in a run of this dtype. NaN differs."""
    name = "float32" if layer.kind == "head" and fp32_head else dtype
    alike = layer.error <= LAYER_ERROR[name] and abs(layer.scale - 1) <= SCALE_ERROR[name]
    return not alike


def explains(guess: Hypothesis, error: float, limit: float) -> bool:
    """Whether a guess leaves so little of an error that it is its name: a small share, or no more than rounding."""
    return guess.residual <= max(LEFT * error, min(0.7 * limit, 0.5 * error))


def best(guesses: list[Hypothesis], error: float) -> list[Hypothesis]:
    """The four best guesses. Of those that leave next to nothing, the order stays as it was."""
    return sorted(guesses, key=lambda guess: max(guess.residual, LEFT * error / 5))[:4]


def norm(x: Tensor) -> float:
    """The square root of the sum of squares."""
    return math.sqrt(float(x.abs().square().sum()))


def error(theirs: Tensor, mine: Tensor) -> float:
    """Norm of the difference over the norm of `mine`."""
    return norm(theirs - mine) / max(norm(mine), 1e-30)


def factor(theirs: Tensor, mine: Tensor) -> float:
    """The factor on `mine` that fits `theirs` best."""
    return float((theirs * mine).sum()) / max(norm(mine) ** 2, 1e-30)


def rounded(x: Tensor, name: str) -> Tensor:
    """Values of one of `FORMATS`; what is too large becomes its largest value."""
    dtype = FORMATS[name]
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype).to(x.dtype)


def is_on_grid(x: Tensor, name: str = "bf16") -> bool:
    """Whether all values are values of a format, and not all 0."""
    return bool(x.any()) and torch.equal(rounded(x, name), x)


def minimum(of: Callable[[float], float], grid: Iterable[float], steps: int = 24) -> tuple[float, float]:
    """The x with the smallest `of(x)`, and that value: the best of a rising grid, then golden sections around it."""
    points = list(grid)
    values = [of(x) for x in points]
    at = min(range(len(points)), key=values.__getitem__)
    low, high, golden = points[max(at - 1, 0)], points[min(at + 1, len(points) - 1)], 0.618034
    best = points[at], values[at]
    for _ in range(steps):
        a, b = high - golden * (high - low), low + golden * (high - low)
        va, vb = of(a), of(b)
        best = min(best, (a, va), (b, vb), key=lambda pair: pair[1])
        low, high = (low, b) if va < vb else (a, high)
    return best


def scaled(theirs: Tensor, mine: Tensor, cause: str = "scale") -> Hypothesis:
    """Everything times one factor."""
    f = factor(theirs, mine)
    return Hypothesis(cause=cause, text=f"it equals the trainer's times {f:.4g}", residual=error(theirs, f * mine))


def outputs(theirs: Tensor, mine: Tensor) -> Iterator[Hypothesis]:
    """What can be seen from outputs alone: a factor, or another dtype."""
    yield scaled(theirs, mine)
    for name in FORMATS:
        text = f"it agrees once its output is rounded to {name}"
        yield Hypothesis(cause="dtype", text=text, residual=error(theirs, rounded(mine, name)))


def grids(weight: Float[Tensor, "O I"]) -> Iterator[tuple[str, Tensor]]:
    """A matrix rounded as quantised models have it, with the name of each way."""
    groups = [("tensor", weight.reshape(1, -1)), ("row", weight), ("column", weight.t())]
    groups += [(f"group of {n}", weight.reshape(-1, n)) for n in (32, 64, 128) if weight.shape[1] % n == 0]
    for per, w in groups:
        size = w.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
        low, high = w.amin(dim=1, keepdim=True), w.amax(dim=1, keepdim=True)

        def back(x: Tensor, per: str = per) -> Tensor:
            return x.t() if per == "column" else x.reshape(weight.shape)

        for bits in (8, 4):
            step = size / (2 ** (bits - 1) - 1)
            yield f"int{bits} with a scale for each {per}", back((w / step).round() * step)
            step = ((high - low) / (2**bits - 1)).clamp(min=1e-30)
            text = f"int{bits} with a scale and a zero point for each {per}"
            yield text, back(((w - low) / step).round() * step + low)
        for name in ("fp8 (e4m3)", "fp8 (e5m2)"):
            step = size / torch.finfo(FORMATS[name]).max
            yield f"{name} with a scale for each {per}", back(rounded(w / step, name) * step)


def tokens(x: Float[Tensor, "N H"]) -> Iterator[tuple[str, Tensor]]:
    """What goes into a layer, rounded as engines with quantised activations have it, with the name of each way."""
    for per, size in (("token", x.abs().amax(dim=-1, keepdim=True)), ("tensor", x.abs().amax())):
        size = size.clamp(min=1e-30)
        yield f"int8 with a scale for each {per}", (x / (size / 127)).round() * (size / 127)
        for name in ("fp8 (e4m3)", "fp8 (e5m2)"):
            step = size / torch.finfo(FORMATS[name]).max
            yield f"{name} with a scale for each {per}", rounded(x / step, name) * step


def stream(theirs: Tensor, mine: Tensor, before: Tensor | None, summands: list[Tensor]) -> list[Hypothesis]:
    """What could be wrong with a residual stream.

    `before` is the stream where the last branch left it, `summands` what the engine adds up to `theirs`.
    """
    found = [scaled(theirs, mine, "residual")]
    for name in ("bf16", "fp16"):
        text = f"it holds only {name} values"
        # The sum of a rounded stream and a branch that is not rounded is on no grid; its summand is.
        on_grid = any(is_on_grid(x, name) for x in summands) and not is_on_grid(mine, name)
        left = 0.0 if on_grid else error(theirs, rounded(mine, name))
        found.append(Hypothesis(cause="residual", text=text, residual=left))
    if before is not None and before.shape == mine.shape:
        branch = mine - before
        # Two normal equations.
        aa, ab, bb = (float((x * y).sum()) for x, y in ((before, before), (before, branch), (branch, branch)))
        at, bt = float((before * theirs).sum()), float((branch * theirs).sum())
        whole = max(aa * bb - ab * ab, 1e-30)
        a, b = (bb * at - ab * bt) / whole, (aa * bt - ab * at) / whole
        text = f"it adds {a:.4g} times the stream and {b:.4g} times the branch"
        left = error(theirs, a * before + b * branch)
        cause = "scale" if abs(a - 1) < 2e-3 else "residual"
        found.append(Hypothesis(cause=cause, text=text, residual=left))
    return found
