"""Which other sampler would give these numbers? Its settings are fitted to them."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from rl.batch import integers
from rl.parity.guesses.guess import Hypothesis
from rl.parity.guesses.told import Told
from rl.sampling.truncation import Truncation, keep

TOP_PS = [0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.98, 0.99]
TOP_KS = [1, 2, 3, 4, 5, 8, 10, 15, 20, 30, 40, 50, 64, 100]
MIN_PS = [0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3]
CANDIDATES = 64
"""Tokens that may have a bias: the most likely ones, and those that were sampled."""
CERTAIN = 6.0
"""Nats of likelihood that decide between two settings."""
MASKED = 1024
"""Tokens that a set of forbidden ones is looked for in."""
BIASED = 4
"""At most so many tokens get a bias of their own."""


def guesses(told: Told) -> Iterator[Hypothesis]:
    """Raw numbers, another temperature, cuts, penalties and biases."""
    yield from _raw(told)
    yield from _temperature(told)
    yield from _cuts(told)
    if told.forbidden is not None:
        whole = told.under(told.temperature, told.truncation, forbids=False)
        text = "the tokens that the run forbids are not left out (rollout.min_tokens, rollout.bad_words)"
        yield Hypothesis(cause="forbidden", text=text, residual=told.left(whole))
    yield from _penalties(told)
    yield from _biases(told)
    yield from _masked(told)


def _raw(told: Told) -> Iterator[Hypothesis]:
    if told.temperature == 1.0 and told.truncation is None:
        return
    raw = told.under(1.0, None, forbids=False)
    # At temperature 1 both guesses give the same numbers; the drawn tokens decide between them.
    chosen = told.targets[:, None]
    nats = float((told.log_p.gather(1, chosen) - raw.gather(1, chosen)).sum())
    if nats > -CERTAIN:
        text = "the numbers are raw log-probabilities, from before temperature and cuts"
        yield Hypothesis(cause="raw_logprobs", text=text, residual=told.left(raw))
    if nats < CERTAIN:
        # As one fitted value, so that raw numbers come first where few tokens leave it open.
        yield Hypothesis(cause="temperature", text="the temperature is 1", residual=told.left(raw), fitted=1)


def _temperature(told: Told) -> Iterator[Hypothesis]:
    best, residual = golden(lambda t: told.left(told.under(t, told.truncation)), 0.02, 4.0)
    if abs(best / told.temperature - 1) > 5e-3 and abs(best - 1) > 5e-3:
        text = f"the temperature is {best:.3g}"
        yield Hypothesis(cause="temperature", text=text, residual=residual, fitted=1)


def _cuts(told: Told) -> Iterator[Hypothesis]:
    if told.truncation is not None:
        text = "the numbers are of the whole vocabulary, without the run's cuts"
        yield Hypothesis(cause="truncation", text=text, residual=told.left(told.under(told.temperature, None)))
    whole = told.under(told.temperature, None)
    d = whole.gather(1, told.targets[:, None])[:, 0] - told.reported
    # A cut only raises the probability of the tokens that it keeps, so d is nowhere positive.
    if float(d.mean()) >= -1e-6 or float((d > 1e-3).float().mean()) > 0.4:
        return
    for cut in cuts(told.logits.shape[1]):
        kept = keep(told.logits / told.temperature, cut).scatter(1, told.targets[:, None], True)
        mass = torch.where(kept, whole, -torch.inf).logsumexp(-1)
        left = float((d - mass).abs().mean())
        text = f"it samples with {name_of(cut)} (or close to it)"
        yield Hypothesis(cause="truncation", text=text, residual=left, fitted=1)


def cuts(vocabulary: int) -> list[Truncation]:
    """The cuts that are tried."""
    top_ks = [Truncation(top_k=k) for k in TOP_KS if k < vocabulary]
    return [*(Truncation(top_p=p) for p in TOP_PS), *top_ks, *(Truncation(min_p=p) for p in MIN_PS)]


def name_of(cut: Truncation) -> str:
    """A cut with one setting, as text."""
    return next(f"{n}={v:g}" for n, v in vars(cut).items() if v != getattr(Truncation(), n))


def _penalties(told: Told) -> Iterator[Hypothesis]:
    """Penalties on tokens that the prompt or the reply contains already (vLLM 0.32, `v1/sample/ops/penalties.py`)."""
    replied, anywhere = seen(told)

    def left(change: Callable[[float], Tensor]) -> Callable[[float], float]:
        return lambda value: told.left(told.under(told.temperature, told.truncation, logits=change(value)))

    def repeated(r: float) -> Tensor:
        return torch.where(anywhere, torch.where(told.logits > 0, told.logits / r, told.logits * r), told.logits)

    changes: dict[str, tuple[Callable[[float], Tensor], float, float, float]] = {
        "repetition": (repeated, 0.5, 2.0, 1.0),
        "presence": (lambda a: told.logits - a * (replied > 0), -2.0, 2.0, 0.0),
        "frequency": (lambda a: told.logits - a * replied, -2.0, 2.0, 0.0),
    }
    for name, (change, low, high, off) in changes.items():
        best, residual = golden(left(change), low, high, tolerance=1e-3)
        if abs(best - off) > 5e-3:
            text = f"a {name} penalty of {best:.3g} is applied"
            yield Hypothesis(cause="penalties", text=text, residual=residual, fitted=1)


def seen(told: Told) -> tuple[Float[Tensor, "N V"], Tensor]:
    """How often each token stands in the reply before each place [N, V], and whether it does there or in the prompt."""
    n, size = told.logits.shape
    replied = torch.zeros(n, size, device=told.logits.device)
    anywhere = torch.zeros(n, size, dtype=torch.bool, device=told.logits.device)
    for reply in told.replies():
        row, start = int(told.rows[reply.start]), int(told.columns[reply.start])
        for i in range(reply.start, reply.stop):
            if i > reply.start:
                replied[i] = replied[i - 1]
                replied[i, told.targets[i - 1]] += 1
            anywhere[i] = replied[i] > 0
            anywhere[i, told.input_ids[row, : start + 1]] = True
    return replied, anywhere


def _biases(told: Told) -> Iterator[Hypothesis]:
    """A few tokens have a bias b. With x = e^b and r = e^(expected - reported): r x(target) = sum over tokens of p x.

    That is linear in x, and the few tokens are found one after the other.
    """
    p = told.log_p.exp()
    ratio = (told.expected - told.reported).clamp(-20, 20).exp()
    likely = p.sum(0)
    likely[told.targets] += 1
    ids = likely.topk(min(CANDIDATES, likely.numel(), max(1, len(ratio) // 4))).indices
    columns = (p[:, ids] - ratio[:, None] * (told.targets[:, None] == ids)).double()
    wanted, chosen = (ratio - 1).double(), list[int]()
    left: Tensor = wanted
    for _ in range(BIASED):
        gains: Tensor = (columns * left[:, None]).sum(0).square() / columns.square().sum(0).clamp(min=1e-12)
        gains[chosen] = 0
        chosen.append(int(gains.argmax()))
        few = columns[:, chosen]
        u = solved(few.t() @ few + 1e-12 * torch.eye(len(chosen)).to(few), few.t() @ wanted)
        u = u.clamp(min=-1 + 1e-6)
        left = wanted - columns[:, chosen] @ u
        x = torch.ones(p.shape[1], dtype=torch.double, device=p.device)
        x[ids[chosen]] = 1 + u
        numbers = told.expected + x[told.targets].log().float() - (p.double() @ x).log().float()
        residual = told.remains(numbers)
        named = {int(ids[c]): float(v) for c, v in zip(chosen, (1 + u).log(), strict=True)}
        if all(b < -4.6 for b in named.values()):
            text = f"it never samples the token(s) {sorted(named)}"
            yield Hypothesis(cause="allowed_tokens", text=text, residual=residual, fitted=len(chosen))
        else:
            biases = ", ".join(f"{token}: {bias:+.2g}" for token, bias in named.items())
            text = f"tokens have a bias ({biases})"
            yield Hypothesis(cause="logit_bias", text=text, residual=residual, fitted=len(chosen))


def solved(a: Float[Tensor, "K K"], b: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """x of a x = b. torch does not state the types of its linear algebra."""
    return torch.linalg.solve(a, b)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _masked(told: Told) -> Iterator[Hypothesis]:
    """A set of tokens is never sampled. Its probability at each place, 1 - e^(expected - reported), is the sum of its
    tokens' probabilities, and none of them is a sampled one."""
    q = 1 - (told.expected - told.reported).clamp(-20, 20).exp()
    if float(q.mean()) < 1e-4 or float((q < -1e-3).float().mean()) > 0.02:
        return
    p = told.log_p.exp()
    possible = (p <= q[:, None] + 1e-4).float().mean(0) > 0.98
    possible[told.targets] = False
    ids = torch.where(possible, p.sum(0), 0.0).topk(min(MASKED, int(possible.sum()))).indices
    if not len(ids) or len(ids) > len(q):
        return
    columns = p[:, ids].double()
    share = torch.full((len(ids),), 0.5, dtype=torch.double, device=p.device)
    largest: Tensor = torch.ones(len(ids), dtype=torch.double, device=p.device)
    for _ in range(30):  # the largest singular value, squared
        largest = columns.t() @ (columns @ (largest / largest.square().sum().sqrt()))
    step = 0.9 / max(1e-12, float(largest.square().sum().sqrt()))
    for _ in range(400):
        share = (share - step * (columns.t() @ (columns @ share - q))).clamp(0, 1)
    masked = ids[share > 0.5]
    rest = 1 - p[:, masked].sum(-1)
    numbers = told.expected - rest.clamp(min=1e-6).log()
    text = f"it never samples {len(masked)} tokens, among them {integers(masked[:4].sort().values)}"
    yield Hypothesis(cause="allowed_tokens", text=text, residual=told.remains(numbers), fitted=BIASED + 1)


def golden(f: Callable[[float], float], low: float, high: float, tolerance: float = 1e-4) -> tuple[float, float]:
    """Where f is smallest between two bounds by golden-section search, and its value there."""
    ratio = 0.6180339887
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = f(a), f(b)
    while high - low > tolerance:
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = f(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = f(b)
    best = (low + high) / 2
    return best, f(best)
