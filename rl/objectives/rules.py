"""What does every objective forbid in a config, by its own fields? `Objective.check` adds what one class forbids."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rl.config


def check_objective(config: "rl.config.Config") -> None:
    """Raise ValueError, with the remedy, where the objective cannot work with the other settings."""
    objective = config.objective
    name = type(objective).__name__
    if objective.group_relative and config.group_size < 2:
        raise ValueError(
            f"group_size=1 gives {name} only zero advantages, because it compares samples of one prompt: use "
            "group_size >= 2, or PPO, whose critic is the baseline"
        )
    if objective.uses_old_logprobs and config.old_logprobs == "rollout":
        raise ValueError(
            f"{name} compares the trainer's log-probabilities with the engine's, and old_logprobs='rollout' makes them "
            "the same: use old_logprobs='recompute' (or 'auto')"
        )
    _check_kl_and_entropy(config)
    t = config.trainer
    if t.value_lr is not None and not objective.uses_values:
        raise ValueError(f"trainer.value_lr={t.value_lr:g} has no value head to train: {name} has no critic; remove it")
    optimizer_steps = config.steps * t.epochs * t.minibatches
    if 0 < optimizer_steps <= objective.critic_warmup:
        raise ValueError(
            f"critic_warmup={objective.critic_warmup} covers all {optimizer_steps} optimizer steps of the run, so the "
            "policy would never learn: lower it, or raise `steps`"
        )
    objective.check(config)


def _check_kl_and_entropy(config: "rl.config.Config") -> None:
    objective = config.objective
    name = type(objective).__name__
    if objective.kl_coef < 0 or objective.entropy_coef < 0:
        raise ValueError(
            f"kl_coef={objective.kl_coef:g} and entropy_coef={objective.entropy_coef:g} must not be negative: a larger "
            "kl_coef keeps the policy closer to the reference, a larger entropy_coef keeps it more random"
        )
    if objective.kl_coef and (objective.kl_in, objective.kl_estimator) == ("loss", "k1"):
        raise ValueError(
            f"k1 in the loss has no gradient on average (rl/objectives/kl.py), so kl_coef={objective.kl_coef:g} would "
            f'do nothing: use {name}(kl_estimator="k2") or "k3+", or kl_in="reward"'
        )
    if objective.kl_target is not None and not (objective.kl_target > 0 and objective.kl_coef > 0):
        raise ValueError(
            f"kl_target={objective.kl_target:g} needs to be above 0, and a kl_coef above 0 to begin with: e.g. "
            f"{name}(kl_coef=0.01, kl_target=0.02)"
        )
    if objective.entropy_target is not None and objective.entropy_target <= 0:
        raise ValueError(
            f"entropy_target={objective.entropy_target:g} must be above 0 nats per token, e.g. "
            f"{name}(entropy_target=0.2)"
        )
