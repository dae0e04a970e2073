"""Do the other terms pull the right way? Bounds of the ratio, penalties, entropy, the critic."""

from collections.abc import Iterator
from dataclasses import replace
from math import log

import torch
from torch import Tensor

from rl.contract.probes import answer, grid, one_token, pull
from rl.contract.run import prepared, run
from rl.contract.trial import TOLERANCE, Check, Trial, Violation

RETURN = [0.02, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0, 2.0]
"""Nats that a token has moved against its advantage."""
CAP = log(1.5)
"""A bound on the loss of tokens with a negative advantage (dual clip, a cap) may begin at a ratio of 1.5."""
INTENDED = "If it is intended, declare `on_purpose = ({!r},)`"


def bounds(trial: Trial) -> Iterator[Violation]:
    """A token that moved against its advantage is still pulled back: a bound is on the other side only."""
    found = bound_of(trial, 1.0, "positive", "less likely") or bound_of(trial, -1.0, "negative", "more likely")
    if found:
        remedy = (
            "A clip binds above 1 for a positive advantage and below 1 for a negative one, never at 1: take the worse "
            "of both, torch.max(-ratio * A, -ratio.clamp(low, high) * A), as rl.objectives.clipped_surrogate does. "
        )
        yield Violation(check="bounds", what=found, remedy=remedy + INTENDED.format("bounds"), method="loss")


def bound_of(trial: Trial, advantage: float, word: str, change: str) -> str:
    """What is wrong with the bound for advantages of one sign; empty if nothing is."""
    away = -advantage * torch.tensor([0.0, *RETURN])
    force = advantage * pull_at(trial, advantage, away)
    along = advantage * pull_at(trial, advantage, -away)
    least = 1e-6 * float(torch.cat([force, along]).abs().max())
    if least < 1e-12:
        return ""  # this sign of advantages is left out altogether
    # Beyond a ratio of 1.5 a token with a negative advantage may be given up: a dual clip does so.
    counts = torch.ones_like(away).bool() if advantage > 0 else away < CAP
    lost = ((force <= least) & counts) | (force < -least)
    if not lost.any():
        return ""
    at = int(lost.nonzero()[0])
    side = "on both sides" if bool(along[-1].abs() <= least) else "on the wrong side"
    ratio = float(away[at].exp())
    moved = f"that became {change} (ratio {ratio:.2g})" if at else "at ratio 1"
    effect = "the gradient moves it further away" if bool(force[at] < -least) else "no gradient brings it back"
    return f"the loss is bounded {side}: a token with a {word} advantage {moved} is out of reach, and {effect}"


def pull_at(trial: Trial, advantage: float, drift: Tensor) -> Tensor:
    """The pull on tokens with this advantage, by how far they drifted [N]."""
    return pull(trial.objective, torch.full_like(drift, advantage), torch.full_like(drift, -3.0), drift)


def penalty(trial: Trial) -> Iterator[Violation]:
    """A term without advantages brings the policy back to the old or the reference policy, not away from it."""
    drift = torch.tensor([2.0, -2.0])
    here = torch.full((2,), -4.0)
    nothing = torch.zeros(2)
    for name, scene in {
        "the old policy": one_token(logprobs=here, old=here - drift),
        "the reference": one_token(logprobs=here, old=here, ref=here - drift),
    }.items():
        out = answer(trial.objective, scene, nothing)
        above, below = (float(x) for x in out.logprobs[:, 1])
        depends = abs(float(out.loss[0, 1] - out.loss[1, 1])) > 1e-6
        if above < -1e-7 and below > 1e-7:
            yield Violation(
                check="penalty",
                what=f"the penalty has the wrong sign: a token 2 nats above {name} is pushed further up, and one 2 "
                "nats below further down",
                remedy=f"A penalty grows with the distance to {name}, and is added to the loss: + coef * distance",
                method="loss",
            )
            return
        if abs(above - below) <= 1e-6 * max(abs(above), 1e-3) and (above > 1e-7 or (abs(above) > 1e-7 and depends)):
            against = f", wherever {name} is" if depends else ""
            yield Violation(
                check="penalty",
                what=f"a term without advantages pushes every sampled token {'down' if above > 0 else 'up'} by the "
                f"same amount{against}: on average over samples such a gradient is 0, so it is noise",
                remedy="As a KL in the loss take k2, 0.5 * (policy.logprobs - ref)**2, or `kl_coef` (rl/objectives/"
                "kl.py shows why log pi - log ref has no gradient on average); as an entropy bonus take "
                "policy.entropy. " + INTENDED.format("penalty"),
                method="loss",
            )
            return


def penalty_in_advantages(trial: Trial) -> Iterator[Violation]:
    """A KL in the advantages pays less to a sequence that is far from the reference, not more."""
    if not trial.objective.uses_reference:
        return
    batch = trial.on_policy.batch
    old = batch.old_logprobs
    assert old is not None
    for row in (0, 4):
        at: list[float] = []
        for by in (-1.0, 0.0, 1.0):
            moved = old + by * batch.mask * (torch.arange(len(old)) == row)[:, None]
            at.append(float(prepared(trial.objective, replace(batch, ref_logprobs=moved))[1][row].sum()))
        low, middle, high = at
        slack = 1e-4 * max(map(abs, at))
        if (low > middle + slack and high > middle + slack) or (low > middle + slack and high < middle - slack):
            yield Violation(
                check="penalty",
                what="the KL in the advantages has the wrong sign: a sequence gets "
                f"{low:.3g} where the policy is a nat per token above the reference, and {middle:.3g} where both agree",
                remedy="Subtract it from the reward: reward - coef * (log pi - log ref)",
                method="advantages",
            )
            return


def entropy(trial: Trial) -> Iterator[Violation]:
    """The loss never rises with the entropy."""
    gradient = trial.whole.entropy
    if bool((gradient > 1e-9).any()):
        mixed = bool((gradient < -1e-9).any())
        yield Violation(
            check="entropy",
            what="the loss rises with the entropy of "
            + (
                "some tokens: a weight made of entropies has a gradient"
                if mixed
                else "a token, so the policy becomes less random"
            ),
            remedy=(
                "Detach the weight: policy.entropy.detach()"
                if mixed
                else "A bonus is subtracted: loss - coef * policy.entropy, or `entropy_coef`"
            )
            + ". "
            + INTENDED.format("entropy"),
            method="loss",
        )


def critic(trial: Trial) -> Iterator[Violation]:
    """Values are drawn to the return, in the unit of the rewards, by a loss that the policy has no part in."""
    if not trial.objective.uses_values:
        return
    objective, scene = trial.objective, trial.scene
    rewards, values = grid([0.0, 1.0, 2.0, 5.0], [-1.0, 0.0, 1.0, 2.0])
    here = torch.full_like(values, -2.0)
    pulled = answer(objective, one_token(logprobs=here, old=here, rewards=rewards, values=values), None).values[:, 1]
    generator = torch.Generator().manual_seed(3)
    elsewhere = scene.nudged(0.3 * torch.randn(scene.batch.mask.shape, generator=generator) * scene.batch.mask)
    leak = (run(objective, elsewhere).values - trial.whole.values).abs().max()
    found = critic_fault(pulled, rewards, values, float(leak / trial.whole.values.abs().max().clamp(min=1e-12)))
    if found:
        yield Violation(check="critic", what=found[0], remedy=found[1], method="loss")


def critic_fault(pulled: Tensor, rewards: Tensor, values: Tensor, leak: float) -> tuple[str, str] | None:
    """What is wrong with the gradients of the values [N] of one-token replies, and the remedy."""
    if pulled.abs().max() < 1e-9:
        return (
            "policy.values have no gradient, so nothing trains the critic",
            "Add the value loss, such as 0.5 * (policy.values - returns)**2, where `returns` come from batch.values "
            "and the rewards",
        )
    if leak > TOLERANCE:
        return (
            "the gradient of the values depends on the policy's log-probabilities: the policy loss reaches the critic",
            "Take the baseline from batch.values, which has no gradient, or policy.values.detach()",
        )
    gap, largest = values - rewards, pulled.abs().max()
    apart = gap != 0
    if bool((pulled[apart] * gap[apart] < 0).all()):
        return (
            "the value loss has the wrong sign: values move away from the returns",
            "A value loss grows with the distance and is added: loss + 0.5 * coef * (policy.values - returns)**2",
        )
    if bool((pulled[~apart].abs() <= 1e-3 * largest).all() and (pulled[apart] * gap[apart] > 0).all()):
        return None
    wrong = int(((pulled.abs() > 1e-3 * largest) & ~apart | apart & (pulled * gap <= 0)).nonzero()[0])
    return (
        f"values are not drawn to the return: a reply of one token with the reward {float(rewards[wrong]):g} and the "
        f"value {float(values[wrong]):g} moves its value {'down' if pulled[wrong] > 0 else 'up'}"
        if pulled[wrong].abs() > 1e-3 * largest
        else f"values are not drawn to the return: a reply of one token with the reward {float(rewards[wrong]):g} "
        f"leaves the value {float(values[wrong]):g} where it is",
        "The target is in the unit of the rewards: raw advantages + batch.values, neither whitened nor scaled, and "
        "without another factor. " + INTENDED.format("critic"),
    )


TERMS: list[Check] = [penalty, penalty_in_advantages, entropy, critic]
