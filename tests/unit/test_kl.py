"""KL estimators against the exact divergence, by enumerating a small vocabulary."""

import pytest
import torch

from rl.kl import kl_estimate

P = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
Q = torch.tensor([0.1, 0.3, 0.2, 0.35, 0.05], dtype=torch.float64)
EXACT = float((P * (P / Q).log()).sum())


def expectation(estimator):
    """Mean over tokens sampled from P, exactly: one column for each token of the vocabulary."""
    return float((P * kl_estimate(P.log()[None], Q.log()[None], estimator)[0]).sum())


@pytest.mark.parametrize("estimator", ["k1", "k3"])
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
    for estimator in ("k1", "k2", "k3"):
        assert kl_estimate(P.log()[None], P.log()[None], estimator).abs().max() == 0


def test_the_gradient_of_k2_is_that_of_the_exact_divergence():
    logits = P.log().clone().requires_grad_()
    exact = (logits.softmax(-1) * (logits.log_softmax(-1) - Q.log())).sum()
    (want,) = torch.autograd.grad(exact, logits)
    sampled = (P * kl_estimate(logits.log_softmax(-1)[None], Q.log()[None], "k2")[0]).sum()
    (got,) = torch.autograd.grad(sampled, logits)
    assert torch.allclose(got, want, atol=1e-12)
    assert want.abs().max() > 0.1
