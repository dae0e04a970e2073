"""Is the policy gradient right: at ratio 1, in what rewards do to it, and as the derivative of the loss?"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rl.contract.probes import grid, nearly, pull
from rl.contract.run import prepared, run, weights_of
from rl.contract.scene import Scene
from rl.contract.trial import Trial, Violation

ADVANTAGES = [-2.0, -1.0, -0.5, 0.5, 1.0, 2.0]
LOGPS = [-0.5, -1.0, -2.0, -4.0]


def policy_gradient(trial: Trial) -> Iterator[Violation]:
    """Where the current policy is the old one, the gradient is -advantage / (the trainer's denominator)."""
    a, logp = grid(ADVANTAGES, LOGPS)
    shape = (len(ADVANTAGES), len(LOGPS))
    strength = (pull(trial.objective, a, logp, torch.zeros_like(a)) / a).reshape(shape)
    found = none(trial, strength) or unit(strength) or direction(trial, strength[:, 1]) or factor(strength[:, 1])
    found = found or anchor(trial) or uneven(trial)
    if found:
        yield found


def amiss(what: str, remedy: str, check: str = "policy gradient") -> Violation:
    """What is wrong at ratio 1, as the end of a sentence."""
    begin = "at ratio 1 the gradient should be -advantage / (the trainer's denominator), and "
    return Violation(check=check, what=begin + what, remedy=remedy, method="loss")


def none(trial: Trial, strength: Tensor) -> Violation | None:
    """No gradient at all, or none that the advantages have a part in."""
    if strength.abs().max() > 1e-6:
        return None
    if trial.whole.logprobs.abs().max() < 1e-9:
        return amiss(
            "there is none",
            "The loss does not depend on policy.logprobs: look for .detach(), .item(), torch.no_grad(), or a ratio of "
            "batch.old_logprobs to itself",
        )
    if not trial.objective.skippable and rises(trial, 0):
        return None
    return amiss(
        "it does not depend on the advantages",
        "Multiply by the `advantages` that loss() gets: corrections and the entropy bonus are part of them",
    )


def unit(strength: Tensor) -> Violation | None:
    """At ratio 1 it does not matter how likely the token was; where it does, numbers have another unit."""
    one = strength[4]  # advantage 1, by log-probability
    logp = torch.tensor(LOGPS)
    if (strength - strength[:, :1]).abs().max() <= 0.01 * strength.abs().max():
        return None
    begin = "it depends on how likely the token was: "
    if nearly(one / logp.exp()):
        return amiss(
            begin + "it is multiplied by the token's probability",
            "A ratio is (policy.logprobs - batch.old_logprobs).exp(): these are log-probabilities, so subtract before "
            "the exp, and weigh by the ratio rather than by the probability",
        )
    if nearly(one * logp):
        return amiss(
            begin + "it is divided by the log-probability",
            "A ratio of probabilities is the exp of a difference: (policy.logprobs - batch.old_logprobs).exp(), not "
            "policy.logprobs / batch.old_logprobs",
        )
    if nearly((one - 1.0) / logp):
        return amiss(
            begin + "it has the weight's own gradient too, times the log-probability",
            "The weight of log pi is a constant: take .detach() of the ratio (rl.objectives.surrogates."
            "truncated_reinforce), and declare `stop_gradient: ClassVar[bool] = True`",
        )
    return amiss(
        begin + f"{float(one.min()):.2g} to {float(one.max()):.2g} times that",
        'Weigh by ratios, which are 1 there. If it is intended, declare `on_purpose = ("policy gradient",)`',
    )


def anchor(trial: Trial) -> Violation | None:
    """What weighs an advantage is the ratio to the policy that sampled, not the one to the reference."""
    if not trial.objective.uses_reference:
        return None
    one, far = torch.ones(2), torch.tensor([0.1, -0.1])
    for a in (one, -one):
        near, high_low = (pull(trial.objective, a, -2.0 * one, 0.0 * one, x) for x in (0.0 * one, far))
        if (high_low - near).abs().max() > 0.01 * near.abs().max():
            return amiss(
                "it depends on how far the policy is from the reference",
                "The ratio is to the policy that sampled: (policy.logprobs - batch.old_logprobs).exp(); the reference "
                'belongs in a penalty. If it is intended, declare `on_purpose = ("policy gradient",)`',
            )
    return None


def direction(trial: Trial, strength: Tensor) -> Violation | None:
    """Positive advantages make a token more likely, negative ones less."""
    if (strength >= -1e-6).all():
        return None
    if (strength < 0).all():
        one = torch.ones(2)
        up, down = pull(trial.objective, one, -2.0 * one, torch.tensor([0.4, -0.4])).abs()
        inverted = abs(float((up / down).log()) + 0.8) < 0.05
        remedy = (
            "The ratio is upside down, old / current: it is (policy.logprobs - batch.old_logprobs).exp()"
            if inverted
            else "loss is minimised: return -ratio * advantages"
        )
        return amiss("it has the wrong sign", remedy, "sign")
    side = "negative" if strength[0] < 0 else "positive"
    effect = "more likely" if side == "negative" else "less likely"
    return amiss(
        f"it has the wrong sign where the advantage is {side}: such tokens become {effect}",
        "The sign of the advantage got lost (abs, square, a min in place of a max): -ratio * advantages keeps it",
        "sign",
    )


def factor(strength: Tensor) -> Violation | None:
    """The gradient is as large as the advantage; another monotonous response to it is the objective's own."""
    size = float(strength.mean())
    if nearly(strength, 1.0, 0.01):
        return None
    if nearly(strength):
        if any(abs(size / bits - 1) < 0.01 for bits in (math.log(2), 1 / math.log(2))):
            remedy = "That is ln 2 or its inverse: log-probabilities are in nats, so use exp and log, not exp2 and log2"
        else:
            remedy = "Leave every denominator to the trainer (`average_over`); a weight on the whole loss belongs in "
            remedy += "the lr"
        return amiss(f"it is {size:.3g} times that", remedy)
    response = strength * torch.tensor(ADVANTAGES)
    if (response.diff() < -1e-4 * response.abs().max()).any():
        return amiss(
            "a larger advantage gives a smaller push",
            'The push may bend, but not turn. If it is intended, declare `on_purpose = ("policy gradient",)`',
        )
    return None


def uneven(trial: Trial) -> Violation | None:
    """Tokens of a real step, by length, reward and place: the same response for all."""
    objective, scene = trial.objective, trial.on_policy
    mask, weights = scene.batch.mask, weights_of(objective, scene.batch.mask)
    whole, without = run(objective, scene), run(objective, scene, scale=0.0)
    live = mask & (whole.advantages.abs() > 1e-2 * whole.advantages.abs().max())
    a, logp = whole.advantages[live], scene.policy.logprobs[live]
    expected = pull(objective, a, logp, torch.zeros_like(a))
    there = expected.abs() > 1e-3 * expected.abs().max()
    got = (((without.logprobs - whole.logprobs) / weights)[live] / expected)[there]
    if not len(got) or nearly(got, 1.0, 0.01):
        return None
    length = mask.sum(dim=1, keepdim=True).expand(mask.shape)[live][there].float()
    reward = scene.batch.rewards[:, None].expand(mask.shape)[live][there]
    if nearly(got * length):
        if objective.average_over == "constant" and nearly(got * length, 1.0):
            return None  # a mean over each sequence, over a constant: another way to write a mean over sequences
        return amiss("the gradient of each token is divided by the length of its sequence once more", DO_NOT_AVERAGE)
    if nearly(got / length):
        remedy = "Take the mean, not the sum, over a sequence's tokens (rl.reduce.masked_mean)"
        return amiss("the gradient of each token is multiplied by the length of its sequence", remedy)
    if (got - reward).abs().max() < 0.02:
        return amiss("it is multiplied by the reward", "The reward is in the advantages already: leave it out")
    idle = got.abs() < 0.01
    if idle.any() and nearly(got[~idle], 1.0):
        share = 100 * float(idle.float().mean())
        remedy = "Something takes tokens out on policy: .detach(), a selection, a mask of another kind than batch.mask"
        return amiss(f"{share:.0f} % of the tokens with an advantage have none", remedy)
    what = f"tokens get {float(got.min()):.2g} to {float(got.max()):.2g} times that"
    remedy = "Weigh tokens in advantages(batch), where the weights are part of the advantage. If loss must do it, "
    return amiss(what, remedy + 'declare `on_purpose = ("policy gradient",)`')


DO_NOT_AVERAGE = 'Do not average yourself: set `average_over="sequences"`, and return the loss of every token'


def rises(trial: Trial, row: int) -> bool:
    """Whether raising a row's reward raises the push on its log-probabilities."""
    pushes = [-float(run(trial.objective, scene).logprobs[row].sum()) for scene in raised_reward(trial, row)]
    return pushes[1] > pushes[0]


def raised_reward(trial: Trial, row: int) -> tuple[Scene, Scene]:
    """The step at ratio 1, and the same with 4 more for one reply."""
    scene = trial.on_policy
    rewards = scene.batch.rewards
    return scene, scene.having(rewards=rewards + 4.0 * (torch.arange(len(rewards)) == row))


def sign(trial: Trial) -> Iterator[Violation]:
    """A higher reward makes a sequence more likely."""
    for row in (0, 3):
        if rises(trial, row):
            continue
        sums = [float(prepared(trial.objective, s.batch)[1][row].sum()) for s in raised_reward(trial, row)]
        if sums[1] > sums[0]:
            what = "does not raise the push on its log-probabilities, although its advantages rise"
            remedy = "loss is minimised: it falls when a token with a positive advantage becomes more likely, as "
            remedy += "-ratio * advantages does"
        else:
            what = f"changes the sum of its advantages from {sums[0]:+.3g} to {sums[1]:+.3g}"
            remedy = "An advantage is the reward minus a baseline, not the other way round"
        method = "loss" if sums[1] > sums[0] else "advantages"
        what = f"raising a sequence's reward by 4 {what}"
        yield Violation(check="sign", what=what, remedy=remedy, method=method)
        return


def zero_advantage(trial: Trial) -> Iterator[Violation]:
    """Zero advantages give zero policy gradient; the trainer and the critic's warm-up rely on it."""
    if not trial.objective.skippable:
        return
    grad = run(trial.objective, trial.scene, scale=0.0).logprobs
    if bool(grad.abs().max() > 1e-7):
        yield Violation(
            check="zero advantage",
            what=f"with all advantages 0 the policy still has a gradient (up to {float(grad.abs().max()):.2g})",
            remedy="Multiply every term by the advantages. If another term is intended (a penalty), declare "
            "`skippable: ClassVar[bool] = False`: then the trainer leaves no row out",
            method="loss",
        )


def finite_differences(trial: Trial) -> Iterator[Violation]:
    """The gradient is the derivative of the loss's value, token by token."""
    if trial.objective.stop_gradient:
        return
    scene, h = trial.scene, 1e-2
    rows, columns = scene.batch.mask.nonzero(as_tuple=True)
    n = len(rows)
    nudge = torch.zeros(2 * n, scene.batch.mask.shape[1])
    nudge[torch.arange(2 * n), columns.repeat(2)] = torch.tensor([h, -h]).repeat_interleave(n)
    copies = scene.rows(rows.repeat(2))
    weights = weights_of(trial.objective, scene.batch.mask)[rows.repeat(2)]
    given = trial.whole.advantages[rows.repeat(2)]
    moved = run(trial.objective, copies.nudged(nudge), given=given, weights=weights).loss.double().sum(dim=1)
    here = trial.whole.loss.double().sum(dim=1)[rows]
    up, down = (moved[:n] - here) / h, (here - moved[n:]) / h
    got = trial.whole.logprobs[rows, columns]
    slack = 0.02 * float(trial.whole.logprobs.abs().max()) + 1e-5
    # At a kink (a clip) every slope between the slopes of both sides is right.
    wrong = (got < torch.minimum(up, down) - slack) | (got > torch.maximum(up, down) + slack)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        yield Violation(
            check="finite differences",
            what=f"the finite difference of the loss at row {int(rows[i])}, column {int(columns[i])} is "
            f"{float(up[i]):.4g}, and backward() gives {float(got[i]):.4g}",
            remedy="A factor that depends on policy.logprobs is detached. If that is intended (CISPO's weight), "
            "declare `stop_gradient: ClassVar[bool] = True`",
            method="loss",
        )
