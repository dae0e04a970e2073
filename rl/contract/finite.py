"""Is every number finite? Equal rewards, replies of one token, rows without tokens, ratios far from 1."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from rl.contract.place import line_of_nan
from rl.contract.run import Outcome, run
from rl.contract.scene import EQUAL, ONE_TOKEN, Scene
from rl.contract.trial import Trial, Violation

STD = (
    "Divide by std + eps, never by std alone; the standard deviation of one number is NaN (`unbiased=False` gives 0), "
    "and sqrt(0) has an infinite gradient. rl.objectives.advantages has group_relative and whiten"
)
KINK = (
    "The gradient of a root or a norm is infinite at 0, and on policy and at prompts policy.logprobs - "
    "batch.old_logprobs is exactly 0: add a small number inside of the root. torch.where does not help: 0 times "
    "infinity is NaN"
)
MEAN = "Divide by mask.sum(dim=1).clamp(min=1), or use rl.reduce.masked_mean"


def occasions(scene: Scene) -> Iterator[tuple[str, str, Scene, str]]:
    """Name of the check, when it happens in a run, the step, and the remedy; each adds one thing to a usual step."""
    count = len(scene.batch.rewards)
    usual = torch.tensor([row for row in range(count) if row != ONE_TOKEN and row not in EQUAL])
    plain = scene.rows(usual)
    mask = plain.batch.mask
    first = mask & (mask.cumsum(dim=1) == 1)
    yield "NaN", "on a usual step", plain, "Look for log(0), 0 / 0, sqrt(0), and exp of numbers that are not ratios"
    yield "NaN", "where the policy is still the old one (the first optimizer step)", plain.on_policy(), KINK
    yield "NaN", "with a group whose rewards are all equal", scene.rows(torch.cat([usual, torch.tensor(EQUAL)])), STD
    yield "NaN", "on a step whose rewards are all equal", plain.having(rewards=torch.full((len(usual),), 0.5)), STD
    yield "NaN", "with a reply of one token", scene.rows(torch.cat([usual, torch.tensor([ONE_TOKEN])])), STD
    yield "NaN", "where every reply has one token", plain.having(mask=first), STD
    no_tokens = mask & (torch.arange(len(mask)) != 2)[:, None]
    yield (
        "empty mask",
        "with a row whose mask is empty (a rank without work gets one)",
        plain.having(mask=no_tokens),
        MEAN,
    )


def finite(trial: Trial) -> Iterator[Violation]:
    """No NaN and no infinity: equal rewards in a group or a step, replies of one token, rows without tokens."""
    objective = trial.objective
    for check, when, scene, remedy in occasions(trial.scene):
        out = run(objective, scene)
        if not out.nonfinite and check == "empty mask":
            out = run(objective, scene, [torch.arange(len(scene.batch.rewards)), torch.arange(0)])
        if out.nonfinite:
            yield Violation(
                check=check,
                what=f"{when}, {described(out, scene)}",
                remedy=KINK if out.nonfinite.startswith("gradient") else remedy,
                method="advantages" if out.nonfinite == "advantages" else "loss",
                place=line_of_nan(objective, lambda scene=scene: run(objective, scene)),
            )
            return


def described(out: Outcome, scene: Scene) -> str:
    """The first number that is not finite, and where it is."""
    name, at = out.nonfinite, out.tensors
    if name not in at:
        return f"{name} is NaN or infinite"
    bad = (~at[name].isfinite()).nonzero()[0]
    row, column = int(bad[0]), int(bad[1])
    tokens = int(scene.batch.mask[row].sum())
    shown = "NaN" if bool(at[name].isnan().any()) else "infinite"
    outside = "" if bool(scene.batch.mask[row, column]) else "; outside the mask"
    verb = "are" if name == "advantages" else "is"
    return (
        f"the {name} {verb} {shown}, first in row {row}, column {column} (reward "
        f"{float(scene.batch.rewards[row]):g}, {tokens} sampled token{'s' * (tokens != 1)}{outside})"
    )


def extreme_ratios(trial: Trial) -> Iterator[Violation]:
    """Ratios of e^20 and e^100, and their inverses, give finite numbers."""
    for nats in (20.0, 100.0, -20.0, -100.0):
        scene = trial.scene.drifted(nats)
        out = replace(run(trial.objective, scene), metrics={})
        if out.nonfinite:
            yield Violation(
                check="extreme ratios",
                what=f"a log-ratio of {nats:g} nats makes the {out.nonfinite} NaN or infinite",
                remedy="Clamp before the exp: rl.objectives.ratios.ratio_of(log_ratio). In fp32 e^89 is infinite, "
                "and its gradient is NaN (0 times infinity) even where torch.where or max picks the other side",
                method="advantages" if out.nonfinite == "advantages" else "loss",
                place=line_of_nan(
                    trial.objective, lambda scene=scene: run(trial.objective, scene), infinite_first=True
                ),
            )
            return
