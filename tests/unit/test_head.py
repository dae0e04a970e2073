"""The chunked head against a dense log_softmax: values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trainer.head
from trainer.head import LogprobHead

TOKENS, HIDDEN, VOCABULARY = 7, 8, 23


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    """7 tokens make chunks of 3, 3 and 1."""
    monkeypatch.setattr(trainer.head, "CHUNK", 3)


def make(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype)
    with torch.no_grad():
        lm_head.weight.copy_(torch.randn(VOCABULARY, HIDDEN, generator=g))
    hidden = torch.randn(TOKENS, HIDDEN, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=g)
    upstream = torch.randn(2, TOKENS, generator=g)
    return lm_head, hidden, targets, upstream


def dense(hidden, weight, targets, temperature, dtype):
    log_p = (F.linear(hidden.to(dtype), weight.to(dtype)).float() / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def both(temperature, *, of, dtype=torch.float32, fp32=True):
    """(logprob, entropy, grad_hidden, grad_weight) of our head and of the dense one, for the same upstream."""
    answers = []
    for ours in (True, False):
        lm_head, hidden, targets, upstream = make(dtype)
        weight = lm_head.weight
        if ours:
            logprob, entropy = LogprobHead(lm_head, fp32=fp32)(hidden, targets, temperature)
        else:
            logprob, entropy = dense(hidden, weight, targets, temperature, torch.float32 if fp32 else dtype)
        loss = 0.0
        if "logprob" in of:
            loss = loss + (upstream[0] * logprob).sum()
        if "entropy" in of:
            loss = loss + (upstream[1] * entropy).sum()
        loss.backward()
        answers.append((logprob.detach(), entropy.detach(), hidden.grad, weight.grad))
    return zip(*answers, strict=True)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("of", [("logprob",), ("entropy",), ("logprob", "entropy")], ids="+".join)
def test_values_and_gradients_are_those_of_a_dense_softmax(of, temperature):
    for ours, want in both(temperature, of=of):
        assert want.abs().max() > 1e-3
        assert torch.allclose(ours, want, atol=2e-6, rtol=1e-5)


def test_one_chunk_and_many_give_the_same(monkeypatch):
    def run(size):
        monkeypatch.setattr(trainer.head, "CHUNK", size)
        lm_head, hidden, targets, upstream = make()
        logprob, entropy = LogprobHead(lm_head, fp32=True)(hidden, targets, 0.8)
        (upstream[0] * logprob + upstream[1] * entropy).sum().backward()
        return logprob.detach(), entropy.detach(), hidden.grad, lm_head.weight.grad

    for size in (1, 2, 7):
        for a, b in zip(run(size), run(1000), strict=True):
            assert torch.allclose(a, b, atol=2e-6)


def test_an_fp32_head_on_bf16_weights_computes_its_logits_in_fp32():
    for ours, want in both(0.9, of=("logprob", "entropy"), dtype=torch.bfloat16, fp32=True):
        assert ours.dtype == want.dtype
        exact = ours.dtype == torch.float32
        assert torch.allclose(ours.float(), want.float(), atol=2e-6 if exact else 1e-2, rtol=1e-2 * (not exact))


def test_a_bf16_head_rounds_its_logits_as_the_dense_one_does():
    for ours, want in both(0.9, of=("logprob", "entropy"), dtype=torch.bfloat16, fp32=False):
        exact = ours.dtype == torch.float32
        assert torch.allclose(ours.float(), want.float(), atol=2e-6 if exact else 3e-2, rtol=2e-2 * (not exact))


def test_the_switch_between_fp32_and_bf16_changes_the_numbers():
    lm_head, hidden, targets, _ = make(torch.bfloat16)
    fine, coarse = (LogprobHead(lm_head, fp32=on)(hidden, targets, 1.0)[0] for on in (True, False))
    assert fine.dtype == coarse.dtype == torch.float32
    assert 1e-4 < (fine - coarse).abs().max() < 0.2


def test_probabilities_over_the_vocabulary_add_up_to_1_and_give_the_entropy():
    lm_head, hidden, _, _ = make()
    everything = torch.arange(VOCABULARY)
    one = hidden[:1].detach().expand(VOCABULARY, -1)
    logprob, entropy = LogprobHead(lm_head, fp32=True)(one, everything, 1.3)
    assert logprob.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.allclose(entropy, -(logprob.exp() * logprob).sum().expand(VOCABULARY), atol=1e-5)


def test_nothing_of_tokens_times_vocabulary_is_held_for_backward():
    lm_head, hidden, targets, _ = make()
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        LogprobHead(lm_head, fp32=True)(hidden, targets, 1.0)
        assert max(held) == VOCABULARY * HIDDEN  # the weight itself is the largest
        held.clear()
        dense(hidden, lm_head.weight, targets, 1.0, torch.float32)
        assert TOKENS * VOCABULARY in held


def test_no_tokens_give_gradients_of_zero():
    lm_head, hidden, targets, _ = make()
    logprob, entropy = LogprobHead(lm_head, fp32=True)(hidden[:0], targets[:0], 1.0)
    (logprob.sum() + entropy.sum()).backward()
    assert lm_head.weight.grad.abs().max() == 0
    assert hidden.grad.abs().max() == 0


def test_the_head_keeps_the_parameter_itself():
    lm_head, *_ = make()
    assert LogprobHead(lm_head, fp32=True).weight is lm_head.weight


def test_a_head_with_a_bias_is_refused():
    with pytest.raises(ValueError, match="bias is not supported"):
        LogprobHead(nn.Linear(4, 5, bias=True), fp32=True)
