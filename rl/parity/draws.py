"""Are the sampled tokens draws from the trainer's distribution? No log-probability of theirs can show it."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from rl.batch import integers
from rl.parity.gap import surprise
from rl.parity.guesses.sampler_fits import cuts, golden, name_of
from rl.parity.guesses.told import Told
from rl.sampling.truncation import keep


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What would be unlikely if every token were an independent draw."""

    surprise: float
    """How much less likely the tokens are than draws, in standard deviations (`rl.parity.gap.surprise`)."""
    tokens: int
    best: int
    """Tokens that are the most likely one at their place."""
    best_expected: float
    best_sigmas: float
    """How far `best` is above its expectation, in standard deviations."""
    stops: int
    """Tokens that end a reply."""
    stops_expected: float
    stops_sigmas: float
    no_stop_nats: float
    """-log probability that no place has a token that ends a reply; 0 if one has."""
    inner_stops: int
    """Tokens that end a reply, with more tokens of the same reply after them."""
    odd_token: int
    """The token whose count is furthest from its expectation."""
    odd_count: int
    odd_expected: float
    odd_sigmas: float
    alike_nats: float
    """-log probability that replies of a group begin with as many equal tokens as the most similar two do, over all
    groups; large when the replies of a group share their randomness."""
    alike_groups: float
    """Share of the groups in which all replies are equal and that is unlikely."""
    likelier: str
    """The temperature or cut under which the tokens are most likely."""
    likelier_nats: float
    """By how much they are more likely under it than under the run's settings; a nat or two is chance."""


SMALL = 8.0
"""Nats that are no sign of another temperature."""
AT_ONCE = 16
"""Tokens whose logits are summed together: a few stay in the processor's cache."""


def draws(told: Told, stop_ids: Collection[int]) -> Draws:
    """Measure it on tokens with all their logits."""
    log_p, targets = told.log_p, told.targets
    p, finite = log_p.exp(), log_p.clamp(min=-1e30)
    entropy = -(p * finite).sum(-1)
    everywhere = torch.ones(len(targets), dtype=torch.bool, device=targets.device)
    top = p.amax(-1)
    best = int((targets == p.argmax(-1)).sum())
    ids = torch.tensor(sorted(i for i in stop_ids if i < p.shape[1]), dtype=torch.long, device=p.device)
    stop_p = p[:, ids].sum(-1).clamp(max=1 - 1e-7).double()
    spread = (stop_p * (1 - stop_p)).sum()
    is_stop = torch.isin(targets, ids)
    ends = torch.zeros(len(targets), dtype=torch.bool, device=targets.device)
    ends[[reply.stop - 1 for reply in told.replies()]] = True
    expected, variance = p.sum(0), (p * (1 - p)).sum(0)
    counts = torch.bincount(targets, minlength=p.shape[1]).float()
    # Below one expected token a count has no normal distribution.
    sigmas = torch.where(variance >= 1, (counts - expected) / variance.clamp(min=1).sqrt(), 0.0)
    odd = int(sigmas.abs().argmax())
    alike, groups = _alike(told)
    likelier, gain = _likelier(told)
    return Draws(
        surprise=surprise(told.expected, entropy, everywhere),
        tokens=len(targets),
        best=best,
        best_expected=float(top.sum()),
        best_sigmas=float((best - top.sum()) / (top * (1 - top)).sum().clamp(min=0.25).sqrt()),
        stops=int(is_stop.sum()),
        stops_expected=float(stop_p.sum()),
        stops_sigmas=float((is_stop.sum() - stop_p.sum()) / spread.sqrt()) if spread >= 1 else 0.0,
        no_stop_nats=0.0 if is_stop.any() else float(-torch.log1p(-stop_p).sum()),
        inner_stops=int((is_stop & ~ends).sum()),
        odd_token=odd,
        odd_count=int(counts[odd]),
        odd_expected=float(expected[odd]),
        odd_sigmas=float(sigmas[odd]),
        alike_nats=alike,
        alike_groups=groups,
        likelier=likelier,
        likelier_nats=gain,
    )


def _likelier(told: Told) -> tuple[str, float]:
    """Another temperature, or a cut, from which the tokens are rather drawn."""
    base = float(told.expected.double().sum())

    # A smaller set would count each sampled token as kept, and look likelier.
    logits = told.logits.masked_fill(told.log_p == -torch.inf, -torch.inf)
    chosen = logits.gather(1, told.targets[:, None])[:, 0]

    def gain(temperature: float) -> float:
        sums = torch.cat([(few / temperature).logsumexp(-1) for few in torch.split(logits, AT_ONCE)])
        return float((chosen / temperature - sums).double().sum()) - base

    t = told.temperature
    # The gain is 0 at the run's temperature and concave in 1/T: between two small losses there is no large gain.
    best, lost = t, 0.0
    if not all(-SMALL < gain(near * t) < 0 for near in (0.95, 1.05)):
        best, lost = golden(lambda t: -gain(t), 0.2 * t, 3 * t, 0.01 * t)
    found = [(f"the temperature {best:.3g}", -lost)]
    p = told.log_p.exp()
    own = p.gather(1, told.targets[:, None])
    likelier = p > own
    rank, above, share = likelier.sum(-1), (p * likelier).sum(-1), own[:, 0] / p.amax(-1)
    for cut in cuts(told.logits.shape[1]) if told.truncation is None else ():
        # Most cuts would have removed a sampled token, which these three numbers show without sorting.
        small = (rank < cut.top_k) | (cut.top_k < 1)
        if not bool((small & (above <= cut.top_p) & (share >= 0.999 * cut.min_p)).all()):
            continue
        fewer = keep(told.logits / told.temperature, cut)
        if bool(fewer.gather(1, told.targets[:, None]).all()):
            mass = told.log_p.masked_fill(~fewer, -torch.inf).logsumexp(-1)
            found.append((name_of(cut), float(-mass.double().sum())))
    return max(found, key=lambda one: one[1])


def _alike(told: Told) -> tuple[float, float]:
    """Pairs of replies of one group, by how unlikely their common beginning is."""
    by_group: dict[int, list[slice]] = {}
    for reply in told.replies():
        by_group.setdefault(int(told.groups[told.rows[reply.start].cpu()]), []).append(reply)
    nats, equal = list[float](), 0
    for replies in by_group.values():
        most, pairs = 0.0, len(replies) * (len(replies) - 1) // 2
        for i, one in enumerate(replies):
            for other in replies[:i]:
                n = min(one.stop - one.start, other.stop - other.start)
                same = (told.targets[one][:n] == told.targets[other][:n]).long().cumprod(0).bool()
                most = max(most, -float(told.expected[one][:n][same].sum()))
        if pairs:
            nats.append(max(0.0, most - math.log(pairs)))
        texts = {tuple(integers(told.targets[reply])) for reply in replies}
        equal += len(replies) > 1 and len(texts) == 1
    # Each group's nats are about exponential; 2 a group is room for their sum.
    return max([0.0, *nats, sum(nats) - 2 * len(nats)]), equal / max(1, len(by_group))
