"""Which rotation did an engine give its queries and keys? Compared with ours of the same vectors, plane by plane."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rl.batch import integers
from rl.parity.body.fits import error, is_on_grid, minimum, norm, rounded
from rl.parity.guesses.guess import Hypothesis

FAR = 64
"""Offsets of positions that are tried, in both directions."""


def explain_rotation(
    theirs: Float[Tensor, "N S D"],
    mine: Float[Tensor, "N S D"],
    cos: Float[Tensor, "S R"],
    sin: Float[Tensor, "S R"],
    prompt: int,
) -> list[Hypothesis]:
    """Guesses; `residual` is the error that each leaves.

    N heads (of queries and keys), D features, the first R of which rotate; `cos` and `sin` made `mine`.
    """
    halves = torch.equal(cos[:, : cos.shape[1] // 2], cos[:, cos.shape[1] // 2 :])
    c, s = (x[:, : x.shape[1] // 2] if halves else x[:, ::2] for x in (cos.double(), sin.double()))
    size, angles = torch.hypot(c, s), torch.atan2(s, c)
    plain = _planes(mine.double(), cos.shape[1], halves) * torch.polar(1 / size, -angles)
    target = _planes(theirs.double(), cos.shape[1], halves)
    rest = norm((theirs - mine)[..., cos.shape[1] :]) ** 2
    whole = norm(mine)

    def left(angles: Tensor, amplitude: float = 1.0) -> float:
        return left_by(torch.polar(size * amplitude, angles))

    def left_by(rotor: Tensor) -> float:
        return math.sqrt(float((target - plain * rotor).abs().square().sum()) + rest) / whole

    steps = len(angles)
    index = torch.arange(steps, dtype=torch.float64)[:, None]
    width = 2 * angles.shape[1]
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    powers = [x / 10 for x in range(20, 220)]
    rotor = torch.polar(size, angles)
    own, off = minimum(lambda x: norm(rotor - torch.polar(size, index * torch.exp(-x * exponents))), powers)
    # cos and sin in bf16 are too coarse to read a frequency from.
    plainly = off <= norm(rotor) * (5e-3 if is_on_grid(cos) else 1e-5)
    # No plane turns by pi or more in one step.
    speed = torch.exp(-own * exponents) if plainly else angles[min(1, steps - 1)]
    together = (target * plain.conj()).sum(0) * size  # its angle is the engine's own angle
    positions, text, is_simple = _positions(together, speed, prompt)
    moved = Hypothesis(cause="positions", text=text, residual=left(positions[:, None] * speed))
    found = [moved] * is_simple

    def guess(text: str, angles: Tensor, amplitude: float = 1.0) -> None:
        found.append(Hypothesis(cause="rope", text=text, residual=left(angles, amplitude)))

    theta = math.exp(minimum(lambda x: left(index * torch.exp(-x * exponents)), powers)[0])
    had = f"the trainer's {math.exp(own):.6g}" if plainly else "the trainer's frequencies are scaled"
    guess(f"theta is {theta:.4g}, {had}", index * torch.exp(-math.log(theta) * exponents))
    f = 2 ** minimum(lambda x: left(index * speed * 2**x), [x / 16 for x in range(-96, 97)])[0]
    guess(f"its frequencies are the trainer's times {f:.4g}", index * speed * f)
    guess("it turns the other way", -angles)
    coarse = torch.complex(*(rounded(x.float(), "bf16").double() for x in (c, s)))
    found.append(Hypothesis(cause="rope", text="its cos and sin are rounded to bf16", residual=left_by(coarse)))
    amplitude = float(together.abs().sum() / (plain.abs().square().sum(0) * size.square()).sum())
    guess(f"it is {amplitude:.4g} times as long", angles, amplitude)
    other = _vectors(_planes(_vectors(plain, halves), width, not halves) * torch.polar(size, angles), not halves)
    text = f"it turns {'neighbouring features' if halves else 'the two halves of a head'} together"
    found.append(Hypothesis(cause="rope", text=text, residual=error(theirs[..., :width].double(), other)))
    if all(one.residual > 0.05 * left(angles) for one in found):
        # As many parameters as planes: only where no simpler guess fits.
        freely = torch.tensor([_speed(together[:, i], float(speed[i])) for i in range(len(speed))]).double()
        ratios = freely / speed
        text = (
            f"its frequencies are {float(ratios[0]):.4g} (first) to {float(ratios[-1]):.4g} (last) times the trainer's"
        )
        guess(text, index * freely)
    return found if is_simple else [*found, moved]


def _positions(together: Tensor, speed: Tensor, prompt: int) -> tuple[Tensor, str, bool]:
    """The position that each token seems to have, a text, and whether one number describes them all."""
    steps = len(together)
    tried = torch.arange(-FAR, steps + FAR, dtype=torch.float64)
    fit = torch.einsum("sr,pr->sp", together, torch.polar(torch.ones(()).double(), -tried[:, None] * speed)).real
    best = tried[fit.argmax(1)]
    moved = integers(best.long() - torch.arange(steps))
    first, late = moved[:prompt], moved[prompt:]
    if not any(moved):
        return best, "every token is at its own position", False
    if len(set(moved)) == 1:
        text = f"every token is at its position {moved[0]:+d}"
    elif not any(first) and len(set(late)) == 1:
        text = f"in decode every token is at its position {late[0]:+d}; the prompt's positions are right"
    elif not any(late) and len(set(first)) == 1:
        text = f"in the prompt every token is at its position {first[0]:+d}; those in decode are right"
    elif len(set(integers(best.long()))) == 1:
        text = f"every token is at position {int(best[0])}"
    else:
        at = next(i for i, x in enumerate(moved) if x)
        return best, f"token {at} is at position {int(best[at])}", False
    return best, text, True


def _speed(together: Tensor, near: float) -> float:
    """The angle per position that fits one plane best, close to 0 or around `near`."""
    index = torch.arange(len(together), dtype=torch.float64)

    def left(speed: float) -> float:
        return -float((together * torch.polar(torch.ones(()).double(), -index * speed)).real.sum())

    coarse = [x * math.pi / 64 for x in range(-64, 65)]
    fine = [near * 2 ** (x / 8) for x in range(-64, 65)] if near > 0 else coarse
    return min((minimum(left, grid, steps=40) for grid in (coarse, fine)), key=lambda pair: pair[1])[0]


def _planes(x: Tensor, width: int, halves: bool) -> Tensor:
    """The rotating features as complex numbers [N, S, R / 2]."""
    x = x[..., :width]
    pair = x.chunk(2, dim=-1) if halves else (x[..., ::2], x[..., 1::2])
    return torch.complex(*(part.contiguous() for part in pair))


def _vectors(z: Tensor, halves: bool) -> Tensor:
    """The inverse of `_planes`."""
    return torch.cat([z.real, z.imag], -1) if halves else torch.stack([z.real, z.imag], -1).flatten(-2)
