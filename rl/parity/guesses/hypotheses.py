"""What would give these numbers for these tokens? Guesses, each with the gap that it leaves."""

from dataclasses import dataclass

from rl.parity.guesses import places, sampler_fits, units
from rl.parity.guesses.guess import Hypothesis
from rl.parity.guesses.told import Told

FITS = 0.05
"""A guess that leaves at most this share of the gap is an explanation; one that leaves more is only the closest."""
ALIKE = 1.5
"""Guesses that leave at most this many times what the best one leaves fit as well as the best."""


def explain(told: Told) -> list[Hypothesis]:
    """Guesses about where the numbers come from, best first. Those about the sampler take most of the time."""
    return sorted([*units.guesses(told), *places.guesses(told), *sampler_fits.guesses(told)], key=lambda g: g.residual)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The guesses that fit, best first; if none does, only the closest."""

    fits: list[Hypothesis]
    closest: Hypothesis | None

    @property
    def cause(self) -> str:
        """Of the best guess; "unexplained" if none fits."""
        return self.fits[0].cause if self.fits else "unexplained"

    def __str__(self) -> str:
        if self.fits:
            texts = " or ".join(g.text for g in self.fits)
            return f"{texts} (leaves {self.fits[0].residual:.1e} nats)"
        return f"closest: {self.closest.text} (leaves {self.closest.residual:.1e} nats)" if self.closest else ""


def judge(guesses: list[Hypothesis], gap: float, noise: float) -> Judgement:
    """Which guesses explain a mean |d| of `gap` nats, where `noise` is what remains between equal sides.

    A guess with no fitted value wins over one with, because the latter can fit by chance.
    """
    if not guesses:
        return Judgement(fits=[], closest=None)
    fits = [g for g in guesses if g.residual <= max(FITS * gap, noise) and g.residual <= 0.5 * gap]
    if not fits:
        return Judgement(fits=[], closest=guesses[0])
    best = max(fits[0].residual, noise / 2)
    alike = sorted((g for g in fits if g.residual <= ALIKE * best), key=lambda g: (g.fitted, g.residual))
    first = alike[0]
    others = [g for g in alike[1:] if g.cause != first.cause and g.fitted <= first.fitted]
    return Judgement(fits=[first, *{g.cause: g for g in reversed(others)}.values()], closest=None)
