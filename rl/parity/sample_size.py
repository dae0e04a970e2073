"""How much of a weighted sample counts? Kish's effective sample size (Kish, "Survey Sampling", 1965)."""

from torch import Tensor


def effective_share(mean: float, square: float) -> float:
    """Effective sample size over sample size, E[w]^2 / E[w^2], from both moments; 0 where every weight is 0."""
    return mean**2 / square if square else 0.0


def effective_sample_share(weights: Tensor) -> float:
    """The same from the weights themselves, of any shape and all of one sign; 0 for no weights."""
    if not weights.numel():
        return 0.0
    w = weights.double()
    return effective_share(float(w.mean()), float((w**2).mean()))
