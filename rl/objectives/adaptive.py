"""How do coefficients adapt after each step? `kl_coef` to the measured KL, `entropy_coef` to the measured entropy."""

from dataclasses import replace

from rl.objectives.objective import Objective

ENTROPY_STEP = 0.005


def coefficients(objective: Objective) -> dict[str, float]:
    """The coefficients of an objective that change during a run, by field name."""
    targets = {"kl_coef": objective.kl_target, "entropy_coef": objective.entropy_target}
    return {name: getattr(objective, name) for name, target in targets.items() if target is not None}


def next_objective(objective: Objective, metrics: dict[str, float]) -> Objective:
    """The objective of the next step, from the metrics of this one."""
    moved = coefficients(objective)
    if objective.kl_target is not None:
        kl = metrics[f"actor/kl_{objective.kl_in}"]
        moved["kl_coef"] = next_kl_coef(objective.kl_coef, kl, objective.kl_target)
    if objective.entropy_target is not None:
        moved["entropy_coef"] = next_entropy_coef(
            objective.entropy_coef, metrics["actor/entropy"], objective.entropy_target
        )
    return replace(objective, **moved)


def next_kl_coef(coef: float, kl: float, target: float) -> float:
    """At most 2 % up where the step's KL (nats per token) was above its target, or down where it was below:
    coef (1 + 0.1 clip(kl / target - 1, -0.2, 0.2)).

    Source: Ziegler et al., "Fine-tuning language models from human preferences", arXiv 1909.08593, section 2.2.
    """
    return coef * (1.0 + 0.1 * max(-0.2, min(0.2, kl / target - 1.0)))


def next_entropy_coef(coef: float, entropy: float, target: float) -> float:
    """0.005 up where the step's entropy (nats per token) was at most its target, else 0.005 down; within [0, 1].

    Source: He et al., "Skywork Open Reasoner 1", arXiv 2505.22312, on adaptive entropy control. There the bonus is also
    off while entropy is above the target; here it decreases to 0 step by step, so the state is one number.
    """
    return min(max(coef + (ENTROPY_STEP if entropy <= target else -ENTROPY_STEP), 0.0), 1.0)
