"""Does an objective keep the contract with the trainer? `check_objective` tries it on small synthetic steps.

It does what the trainer will do: it cuts whole steps into micro-batches and ranks, pads them, adds empty rows, and
moves ratios far from 1. Every violation names the mistake in the user's terms, and how to fix it.
"""

from rl.contract.gradients import extreme_ratios, finite_differences, policy_gradient, sign, zero_advantage
from rl.contract.invariances import empty_rows, groups, outside_mask, pure, ranks, row_order, splits
from rl.contract.shapes import raised, shapes
from rl.contract.synthetic_step import SyntheticStep
from rl.contract.trial import Check, Trial, Violation
from rl.objectives.objective import Objective

CHECKS: list[Check] = [
    pure,
    splits,
    ranks,
    empty_rows,
    outside_mask,
    row_order,
    groups,
    sign,
    policy_gradient,
    zero_advantage,
    finite_differences,
    extreme_ratios,
]


def check_objective(objective: Objective, *, seed: int = 0) -> list[Violation]:
    """Everything that is wrong with an objective; empty when it keeps the contract. Takes a second on one core."""
    synthetic = SyntheticStep(objective=objective, seed=seed)
    batch = synthetic.batch()
    found = [*shapes(synthetic, batch)]
    if found:
        return found
    trial = Trial(objective=objective, synthetic=synthetic, batch=batch, whole=synthetic.run(batch))
    for check in CHECKS:
        try:
            found += check(trial)
        except Exception as error:  # an objective may raise anything, and that is the answer
            found.append(raised(f"in the check {check.__name__!r}", error))
    return found


def assert_objective(objective: Objective) -> None:
    """For a test of your own: raises AssertionError with every violation."""
    found = check_objective(objective)
    assert not found, f"{type(objective).__name__} breaks its contract:\n" + "\n".join(f"- {v}" for v in found)
