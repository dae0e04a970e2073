"""Does an objective keep the contract with the trainer? `check_objective` tries it on small synthetic steps.

It does what the trainer will do: it cuts whole steps into micro-batches and ranks, pads them, adds empty rows, and
moves ratios far from 1. Every violation names the mistake in the user's terms, and how to fix it. Checks come in
stages: what breaks an earlier stage would only confuse the later ones, so these wait.
"""

from dataclasses import replace

from rl.contract import episodes, gradients, invariances, terms
from rl.contract import finite as numbers
from rl.contract.place import line_of
from rl.contract.scene import draw
from rl.contract.shapes import raised, shapes
from rl.contract.trial import Check, Trial, Violation
from rl.objectives.objective import Objective

STAGES: list[list[Check]] = [
    [numbers.finite],
    [invariances.pure],
    [invariances.same_column],
    [invariances.row_order, invariances.outside_mask, invariances.position, invariances.splits],
    [episodes.cut_into_rows],
    [invariances.groups, gradients.policy_gradient, numbers.extreme_ratios, *terms.TERMS],
    [gradients.sign, gradients.zero_advantage, gradients.finite_differences, terms.bounds],
]
"""A check runs if no earlier stage found anything; those of one stage do not depend on one another."""
CHECKS = [check for stage in STAGES for check in stage]


def check_objective(objective: Objective, *, seed: int = 0) -> list[Violation]:
    """Everything that is wrong with an objective; empty when it keeps the contract. Takes 0.2 s on one core."""
    scene = draw(critic=objective.uses_values, seed=seed)
    found = [*shapes(objective, scene.each(lambda x: x.clone()))]
    trial = Trial(objective, scene)
    for stage in STAGES:
        if found:
            break
        for check in stage:
            try:
                found += [v for v in check(trial) if v.check not in objective.on_purpose]
            except Exception as error:  # an objective may raise anything, and that is the answer
                found.append(raised(objective, f"in the check {check.__name__!r}", error))
    return [replace(v, place=v.place or line_of(objective, v.method)) for v in found]


def assert_objective(objective: Objective) -> None:
    """For a test of your own: raises AssertionError with every violation."""
    found = check_objective(objective)
    assert not found, f"{type(objective).__name__} breaks its contract:\n" + "\n".join(f"- {v}" for v in found)
