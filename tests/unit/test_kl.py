"""KL estimators against the exact divergence, by enumerating a small vocabulary."""

import pytest
import torch

from rl.objectives.kl import kl_estimate

P = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
Q = torch.tensor([0.1, 0.3, 0.2, 0.35, 0.05], dtype=torch.float64)
EXACT = float((P * (P / Q).log()).sum())


def expectation(estimator):
    """Mean over tokens sampled from P, exactly: one column for each token of the vocabulary."""
    return float((P * kl_estimate(P.log()[None], Q.log()[None], estimator)[0]).sum())


@pytest.mark.parametrize("estimator", ["k1", "k3", "k3+"])
def test_k1_and_k3_are_unbiased(estimator):
    assert expectation(estimator) == pytest.approx(EXACT, abs=1e-12)


def test_k2_is_the_mean_of_half_the_squared_log_ratio_and_biased():
    assert expectation("k2") == pytest.approx(float((P * (P / Q).log() ** 2).sum() / 2), abs=1e-12)
    assert abs(expectation("k2") - EXACT) > 0.01


def test_the_three_estimators_of_one_token_by_hand():
    # The policy gives it 1/2, the reference 1/4: d = -ln 2.
    ln2 = 0.6931471805599453
    logprobs, other = torch.tensor([[-ln2]], dtype=torch.float64), torch.tensor([[-2 * ln2]], dtype=torch.float64)
    assert float(kl_estimate(logprobs, other, "k1")) == pytest.approx(ln2)
    assert float(kl_estimate(logprobs, other, "k2")) == pytest.approx(ln2**2 / 2)
    assert float(kl_estimate(logprobs, other, "k3")) == pytest.approx(0.5 + ln2 - 1)


def test_k3_is_never_negative_where_k1_is():
    logprobs, other = P.log()[None], Q.log()[None]
    assert (kl_estimate(logprobs, other, "k1") < 0).any()
    assert (kl_estimate(logprobs, other, "k3") >= 0).all()


def test_every_estimator_is_zero_where_the_policies_agree():
    for estimator in ("k1", "k2", "k3", "k3+"):
        assert kl_estimate(P.log()[None], P.log()[None], estimator).abs().max() == 0


def gradients(estimator):
    """Mean gradient of an estimator over tokens sampled from P, and those of both exact divergences."""
    logits = P.log().clone().requires_grad_()
    now = logits.log_softmax(-1)
    forward, backward = (logits.softmax(-1) * (now - Q.log())).sum(), (Q * (Q.log() - now)).sum()
    sampled = (P * kl_estimate(now[None], Q.log()[None], estimator)[0]).sum()
    return [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (sampled, forward, backward)]


@pytest.mark.parametrize("estimator", ["k2", "k3+"])
def test_the_gradient_of_k2_and_k3_plus_is_that_of_the_exact_divergence(estimator):
    got, want, _ = gradients(estimator)
    assert torch.allclose(got, want, atol=1e-12)
    assert want.abs().max() > 0.1


def test_the_gradient_of_k1_is_nothing_and_that_of_k3_is_the_other_divergence_s():
    assert gradients("k1")[0].abs().max() < 1e-12
    got, forward, backward = gradients("k3")
    assert torch.allclose(got, backward, atol=1e-12)
    assert (got - forward).abs().max() > 0.1


def test_in_the_reward_k1_gives_the_gradient_of_the_exact_divergence():
    # E[k1 grad log pi], with the value as a reward.
    logits = P.log().clone().requires_grad_()
    now = logits.log_softmax(-1)
    value = kl_estimate(now[None], Q.log()[None], "k1")[0].detach()
    (got,) = torch.autograd.grad((P * value * now).sum(), logits)
    assert torch.allclose(got, gradients("k1")[1], atol=1e-12)


def test_a_token_far_from_the_reference_gives_a_finite_number_and_gradient():
    for d in (100.0, -100.0):
        now = torch.tensor([[-1.0]], requires_grad=True)
        kl = kl_estimate(now, now.detach() + d, "k3")
        kl.sum().backward()
        assert kl.isfinite().all()
        assert now.grad.isfinite().all()
