"""Coefficients that follow what a step measured."""

import pytest

from rl.objectives import GRPO, GSPO
from rl.objectives.adaptive import coefficients, next_entropy_coef, next_kl_coef, next_objective


@pytest.mark.parametrize(
    ("kl", "coef"), [(0.02, 0.1), (0.022, 0.101), (0.018, 0.099), (0.5, 0.102), (0.0, 0.098), (-1.0, 0.098)]
)
def test_the_kl_coefficient_follows_the_step_s_kl_by_at_most_two_percent(kl, coef):
    assert next_kl_coef(0.1, kl, 0.02) == pytest.approx(coef, rel=1e-6)


@pytest.mark.parametrize(
    ("coef", "entropy", "then"),
    [
        (0.1, 0.19, 0.105),
        (0.1, 0.2, 0.105),
        (0.1, 0.21, 0.095),
        (0.002, 0.5, 0.0),
        (0.998, 0.0, 1.0),
        (0.0, 0.1, 0.005),
    ],
)
def test_the_entropy_coefficient_goes_up_where_entropy_is_too_low_and_down_to_nothing_elsewhere(coef, entropy, then):
    assert next_entropy_coef(coef, entropy, 0.2) == pytest.approx(then, rel=1e-6)


def test_only_what_has_a_target_moves():
    step = {"actor/kl_loss": 0.5, "actor/kl_reward": 0.0, "actor/entropy": 0.1}
    still = GRPO(kl_coef=0.1, entropy_coef=0.01)
    assert coefficients(still) == {}
    assert next_objective(still, step) == still
    both = GSPO(kl_coef=0.1, kl_target=0.02, entropy_target=0.2)
    assert coefficients(both) == {"kl_coef": 0.1, "entropy_coef": 0.0}
    after = next_objective(both, step)
    assert isinstance(after, GSPO)
    assert coefficients(after) == pytest.approx({"kl_coef": 0.102, "entropy_coef": 0.005})
    paid = GRPO(kl_coef=0.1, kl_target=0.02, kl_in="reward", kl_estimator="k1")
    assert next_objective(paid, step).kl_coef == pytest.approx(0.098)
