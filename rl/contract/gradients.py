"""What the gradient must do: its sign, its size on policy, zero where the advantage is, finite at extremes."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rl.contract.trial import Finding, Trial
from rl.types import Batch


def _sign(trial: Trial) -> Iterator[Finding]:
    """A sequence that is rewarded more becomes more likely than it would have."""
    bench, batch = trial.bench, bench_on_policy(trial)
    for row in (0, 3):
        better = replace(batch, rewards=batch.rewards + 4.0 * (torch.arange(len(batch.rewards)) == row))
        push = [-float(bench.step(b).logprobs[row].sum()) for b in (batch, better)]
        if not push[1] > push[0]:
            yield Finding(
                law="sign",
                what=f"raising a sequence's reward by 4 changes the push on its log-probability from {push[0]:+.3g} to "
                f"{push[1]:+.3g}",
                remedy="loss is minimised: it falls when a token with a positive advantage becomes more likely, as "
                "-ratio * advantages does",
            )
            return


def _gradient_on_policy(trial: Trial) -> Iterator[Finding]:
    """Where the policy is the old one, the gradient is the policy gradient: -A over the trainer's denominator."""
    bench, batch = trial.bench, bench_on_policy(trial)
    out = bench.step(batch)
    want = -bench.advantages(batch)[1] * bench.weights(batch)
    live = batch.mask & (want.abs() > 1e-3 * want.abs().max())
    factor = (out.logprobs / want)[live]
    if bool((factor - 1).abs().max() < 0.01):
        return
    length = batch.mask.sum(dim=1, keepdim=True).expand_as(want)[live].float()
    if bool(factor.abs().max() < 1e-3):
        what, remedy = (
            "there is none",
            (
                "The loss does not depend on policy.logprobs: a .detach(), .item(), torch.no_grad() or a ratio of "
                "batch.old_logprobs to itself cuts it off"
            ),
        )
    elif bool((factor < 0).all()):
        what, remedy = "it has the wrong sign", "loss is minimised: return -ratio * advantages"
    elif _steady(factor * length):
        what = "each token's is divided by the length of its sequence once more"
        remedy = 'Do not average yourself: set `average_over="sequences"`, and return the loss of every token'
    elif _steady(factor / length):
        what = "each token's is multiplied by the length of its sequence"
        remedy = "Take the mean, not the sum, over a sequence's tokens (rl.reduce.masked_mean)"
    elif _steady(factor):
        what = f"it is {float(factor.mean()):.3g} times that"
        remedy = "Leave every denominator to the trainer (`average_over`); a weight on all of it belongs in the lr"
    else:
        what = f"tokens get {float(factor.min()):.2g} to {float(factor.max()):.2g} times that"
        remedy = "Weigh tokens in advantages(batch), where the weights are part of the advantage"
    yield Finding(
        law="policy gradient",
        what=f"at ratio 1 the gradient should be -advantage / (the trainer's denominator), and {what}",
        remedy=remedy,
    )


def _zero_advantage(trial: Trial) -> Iterator[Finding]:
    """Zero advantages give zero policy gradient, on which the trainer and the critic's warm-up rely."""
    if not trial.objective.skippable:
        return
    grad = trial.bench.step(trial.batch, scale=0.0).logprobs
    if bool(grad.abs().max() > 1e-7):
        yield Finding(
            law="zero advantage",
            what=f"with all advantages 0 the policy still has a gradient (up to {float(grad.abs().max()):.2g})",
            remedy="Multiply every term by the advantages. If another term is meant (a penalty), declare `skippable: "
            "ClassVar[bool] = False`: then the trainer leaves no row out",
        )


def _finite_differences(trial: Trial) -> Iterator[Finding]:
    """The gradient is that of the loss's value, token by token."""
    if trial.objective.stop_gradient:
        return
    bench, batch, h = trial.bench, trial.batch, 1e-2
    scale = float(trial.whole.logprobs.abs().max())
    for row, column in batch.mask.nonzero()[::3].tolist():
        nudge = torch.zeros(batch.mask.shape)
        nudge[row, column] = h
        up, down = (bench.step(batch, nudge=sign * nudge).total for sign in (1, -1))
        slopes = sorted([(up - trial.whole.total) / h, (trial.whole.total - down) / h])
        got = float(trial.whole.logprobs[row, column])
        # At a kink any slope between those of the two sides is right.
        if not slopes[0] - 0.02 * scale - 1e-5 <= got <= slopes[1] + 0.02 * scale + 1e-5:
            yield Finding(
                law="finite differences",
                what=f"the loss's value says that the gradient of row {row}, token {column} is {slopes[0]:.4g}, and "
                f"backward() says {got:.4g}",
                remedy="A factor that depends on policy.logprobs is detached. If that is on purpose (CISPO's weight), "
                "declare `stop_gradient: ClassVar[bool] = True`",
            )
            return


def _extremes(trial: Trial) -> Iterator[Finding]:
    """Ratios of e^20 to e^100 give finite numbers."""
    for nats in (20.0, 100.0, -20.0, -100.0):
        out = trial.bench.step(trial.bench.extreme(trial.batch, nats), drift=nats)
        if not out.finite:
            yield Finding(
                law="extreme ratios",
                what=f"a log-ratio of {nats:g} nats makes the loss or its gradient NaN or infinite",
                remedy="Clamp before the exp: rl.objectives.ratios.ratio_of(log_ratio). In fp32 e^89 is infinite, "
                "and 0 times infinity is NaN also where torch.where or max picks the other side",
            )
            return


def bench_on_policy(trial: Trial) -> Batch:
    """The step's batch as its first optimizer step sees it: sampled by the policy of now."""
    now = trial.bench.policy(trial.batch).logprobs.detach()
    return replace(trial.batch, old_logprobs=now, rollout_logprobs=now)


def _steady(x: Tensor) -> bool:
    """Whether all numbers are the same but for rounding, and not 0."""
    return bool((x - x.mean()).abs().max() < 0.02 * x.mean().abs())
