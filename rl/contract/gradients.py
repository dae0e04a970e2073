"""Is the gradient right? Its sign, its size on policy, 0 where the advantage is 0, finite at extreme ratios."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rl.contract.trial import Trial, Violation
from rl.types import Batch


def sign(trial: Trial) -> Iterator[Violation]:
    """A higher reward makes a sequence more likely."""
    synthetic, batch = trial.synthetic, on_policy(trial)
    for row in (0, 3):
        better = replace(batch, rewards=batch.rewards + 4.0 * (torch.arange(len(batch.rewards)) == row))
        push = [-float(synthetic.run(b).logprobs[row].sum()) for b in (batch, better)]
        if not push[1] > push[0]:
            yield Violation(
                check="sign",
                what=f"raising a sequence's reward by 4 changes the push on its log-probability from {push[0]:+.3g} to "
                f"{push[1]:+.3g}",
                remedy="loss is minimised: it falls when a token with a positive advantage becomes more likely, as "
                "-ratio * advantages does",
            )
            return


def policy_gradient(trial: Trial) -> Iterator[Violation]:
    """Where the current policy is the old one, the gradient is -advantage / (the trainer's denominator)."""
    synthetic, batch = trial.synthetic, on_policy(trial)
    out = synthetic.run(batch)
    want = -synthetic.advantages(batch)[1] * synthetic.weights(batch)
    live = batch.mask & (want.abs() > 1e-3 * want.abs().max())
    factor = (out.logprobs / want)[live]
    if bool((factor - 1).abs().max() < 0.01):
        return
    length = batch.mask.sum(dim=1, keepdim=True).expand_as(want)[live].float()
    if bool(factor.abs().max() < 1e-3):
        what, remedy = (
            "there is none",
            (
                "The loss does not depend on policy.logprobs: look for .detach(), .item(), torch.no_grad(), or a ratio "
                "of batch.old_logprobs to itself"
            ),
        )
    elif bool((factor < 0).all()):
        what, remedy = "it has the wrong sign", "loss is minimised: return -ratio * advantages"
    elif nearly_constant(factor * length):
        what = "the gradient of each token is divided by the length of its sequence once more"
        remedy = 'Do not average yourself: set `average_over="sequences"`, and return the loss of every token'
    elif nearly_constant(factor / length):
        what = "the gradient of each token is multiplied by the length of its sequence"
        remedy = "Take the mean, not the sum, over a sequence's tokens (rl.reduce.masked_mean)"
    elif nearly_constant(factor):
        what = f"it is {float(factor.mean()):.3g} times that"
        remedy = "Leave every denominator to the trainer (`average_over`); a weight on the whole loss belongs in the lr"
    else:
        what = f"tokens get {float(factor.min()):.2g} to {float(factor.max()):.2g} times that"
        remedy = "Weigh tokens in advantages(batch), where the weights are part of the advantage"
    yield Violation(
        check="policy gradient",
        what=f"at ratio 1 the gradient should be -advantage / (the trainer's denominator), and {what}",
        remedy=remedy,
    )


def zero_advantage(trial: Trial) -> Iterator[Violation]:
    """Zero advantages give zero policy gradient; the trainer and the critic's warm-up rely on it."""
    if not trial.objective.skippable:
        return
    grad = trial.synthetic.run(trial.batch, scale=0.0).logprobs
    if bool(grad.abs().max() > 1e-7):
        yield Violation(
            check="zero advantage",
            what=f"with all advantages 0 the policy still has a gradient (up to {float(grad.abs().max()):.2g})",
            remedy="Multiply every term by the advantages. If another term is intended (a penalty), declare "
            "`skippable: ClassVar[bool] = False`: then the trainer leaves no row out",
        )


def finite_differences(trial: Trial) -> Iterator[Violation]:
    """The gradient is the derivative of the loss's value, token by token."""
    if trial.objective.stop_gradient:
        return
    synthetic, batch, h = trial.synthetic, trial.batch, 1e-2
    scale = float(trial.whole.logprobs.abs().max())
    for row, column in batch.mask.nonzero()[::3].tolist():
        nudge = torch.zeros(batch.mask.shape)
        nudge[row, column] = h
        up, down = (synthetic.run(batch, nudge=sign * nudge).total for sign in (1, -1))
        slopes = sorted([(up - trial.whole.total) / h, (trial.whole.total - down) / h])
        got = float(trial.whole.logprobs[row, column])
        # At a kink (a clip) every slope between the slopes of both sides is right.
        if not slopes[0] - 0.02 * scale - 1e-5 <= got <= slopes[1] + 0.02 * scale + 1e-5:
            yield Violation(
                check="finite differences",
                what=f"the finite difference of the loss at row {row}, token {column} is {slopes[0]:.4g}, and "
                f"backward() gives {got:.4g}",
                remedy="A factor that depends on policy.logprobs is detached. If that is intended (CISPO's weight), "
                "declare `stop_gradient: ClassVar[bool] = True`",
            )
            return


def extreme_ratios(trial: Trial) -> Iterator[Violation]:
    """Ratios of e^20 and e^100, and their inverses, give finite numbers."""
    for nats in (20.0, 100.0, -20.0, -100.0):
        out = trial.synthetic.run(trial.synthetic.extreme(trial.batch, nats), drift=nats)
        if not out.finite:
            yield Violation(
                check="extreme ratios",
                what=f"a log-ratio of {nats:g} nats makes the loss or its gradient NaN or infinite",
                remedy="Clamp before the exp: rl.objectives.ratios.ratio_of(log_ratio). In fp32 e^89 is infinite, "
                "and its gradient is NaN (0 times infinity) even where torch.where or max picks the other side",
            )
            return


def on_policy(trial: Trial) -> Batch:
    """The batch of a first optimizer step: the current policy sampled it."""
    now = trial.synthetic.policy(trial.batch).logprobs.detach()
    return replace(trial.batch, old_logprobs=now, rollout_logprobs=now)


def nearly_constant(x: Tensor) -> bool:
    """Whether all numbers are within 2 % of their mean, which is not 0."""
    return bool((x - x.mean()).abs().max() < 0.02 * x.mean().abs())
