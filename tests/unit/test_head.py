"""The chunked head against a dense log_softmax: values and gradients, over the whole vocabulary and over a part."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trainer.model.head
from rl.sampling.truncation import Truncation, keep
from trainer.model.head import LogprobHead

TOKENS, HIDDEN, VOCABULARY = 7, 8, 23


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    """7 tokens make chunks of 3, 3 and 1."""
    monkeypatch.setattr(trainer.model.head, "CHUNK", 3)


def make(dtype=torch.float32, scale=1.0):
    g = torch.Generator().manual_seed(0)
    lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype)
    with torch.no_grad():
        lm_head.weight.copy_(torch.randn(VOCABULARY, HIDDEN, generator=g) * scale)
    hidden = torch.randn(TOKENS, HIDDEN, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=g)
    upstream = torch.randn(2, TOKENS, generator=g)
    return lm_head, hidden, targets, upstream


def dense(hidden, weight, targets, temperature, dtype):
    logits = F.linear(hidden.to(dtype), weight.to(dtype)).to(torch.promote_types(dtype, torch.float32))
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def answers(temperature, *, of, ours, dtype=torch.float32, fp32=True):
    """(logprob, entropy, grad_hidden, grad_weight) of our head or of the dense one, for the same upstream."""
    lm_head, hidden, targets, upstream = make(dtype)
    if ours:
        logprob, entropy = LogprobHead(lm_head, fp32=fp32)(hidden, targets, temperature)
    else:
        computed = torch.promote_types(dtype, torch.float32) if fp32 else dtype
        logprob, entropy = dense(hidden, lm_head.weight, targets, temperature, computed)
    loss = 0.0
    if "logprob" in of:
        loss = loss + (upstream[0] * logprob).sum()
    if "entropy" in of:
        loss = loss + (upstream[1] * entropy).sum()
    loss.backward()
    return logprob.detach(), entropy.detach(), hidden.grad, lm_head.weight.grad


def both(temperature, **how):
    return zip(answers(temperature, ours=True, **how), answers(temperature, ours=False, **how), strict=True)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("of", [("logprob",), ("entropy",), ("logprob", "entropy")], ids="+".join)
def test_values_and_gradients_are_those_of_a_dense_softmax(of, temperature):
    # The gradient of an entropy is a small difference of large numbers: how well fp32 can do depends on the processor,
    # and the dense softmax shows it.
    exact = answers(temperature, of=of, ours=False, dtype=torch.float64)
    for (ours, plain), want in zip(both(temperature, of=of), exact, strict=True):
        assert want.abs().max() > 1e-3
        error, best = ((x.double() - want).norm() / want.norm() for x in (ours, plain))
        assert best < 1e-5
        assert error <= max(1e-6, 3 * best)


def test_one_chunk_and_many_give_the_same(monkeypatch):
    def run(size):
        monkeypatch.setattr(trainer.model.head, "CHUNK", size)
        lm_head, hidden, targets, upstream = make()
        logprob, entropy = LogprobHead(lm_head, fp32=True)(hidden, targets, 0.8)
        (upstream[0] * logprob + upstream[1] * entropy).sum().backward()
        return logprob.detach(), entropy.detach(), hidden.grad, lm_head.weight.grad

    for size in (1, 2, 7):
        for a, b in zip(run(size), run(1000), strict=True):
            assert torch.allclose(a, b, atol=5e-6)


def test_an_fp32_head_on_bf16_weights_computes_its_logits_in_fp32():
    for ours, want in both(0.9, of=("logprob", "entropy"), dtype=torch.bfloat16, fp32=True):
        assert ours.dtype == want.dtype
        exact = ours.dtype == torch.float32
        assert torch.allclose(ours.float(), want.float(), atol=5e-6 if exact else 1e-2, rtol=1e-2 * (not exact))


def test_a_bf16_head_rounds_its_logits_as_the_dense_one_does():
    for ours, want in both(0.9, of=("logprob", "entropy"), dtype=torch.bfloat16, fp32=False):
        exact = ours.dtype == torch.float32
        assert torch.allclose(ours.float(), want.float(), atol=5e-6 if exact else 3e-2, rtol=2e-2 * (not exact))


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


CUTS = [Truncation(top_k=4), Truncation(top_p=0.6), Truncation(min_p=0.2), Truncation(top_p=0.8, top_k=6, min_p=0.01)]


def kept_by(lm_head, hidden, targets, truncation, temperature):
    """The support [TOKENS, VOCABULARY] that the engine would have sampled from; it holds every target."""
    with torch.no_grad():
        kept = keep(F.linear(hidden, lm_head.weight) / temperature, truncation)
    return kept.scatter(1, targets[:, None], True)


def ids_of(kept):
    """The same as ids, padded with -1 to the widest row."""
    width = int(kept.sum(1).max())
    rows = [row.nonzero()[:, 0].tolist() for row in kept]
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32)


def dense_over(kept, hidden, weight, targets, temperature):
    """softmax over the kept tokens alone, by autograd in fp64."""
    z = F.linear(hidden.double(), weight.double()) / temperature
    log_p = z.masked_fill(~kept, -torch.inf).log_softmax(-1)
    p, finite = log_p.exp(), log_p.masked_fill(~kept, 0.0)
    return finite.gather(-1, targets[:, None])[:, 0], -(p * finite).sum(-1)


def learned(answer, upstream, hidden, weight, of):
    """(logprob, entropy, grad_hidden, grad_weight) for the usual upstream."""
    logprob, entropy = answer
    total = sum(
        (u * x).sum() for name, u, x in zip(("logprob", "entropy"), upstream, answer, strict=True) if name in of
    )
    total.backward()
    return logprob.detach(), entropy.detach(), hidden.grad, weight.grad


def over_the_kept(way, truncation, temperature, of):
    """What the dense reference or our head, told in one of three ways what was kept, gives and learns."""
    lm_head, hidden, targets, upstream = make(scale=0.5)  # logits of a few nats, whose last digit is 2e-7
    kept = kept_by(lm_head, hidden, targets, truncation, temperature)
    assert kept.sum(1).min() < VOCABULARY / 2
    if way == "dense":
        answer = dense_over(kept, hidden, lm_head.weight, targets, temperature)
    else:
        told = {
            "truncation": (truncation, None),
            "support": (None, ids_of(kept)),
            # What the engine reports wins over what we would find, here something else.
            "both": (Truncation(top_k=1), ids_of(kept)),
        }[way]
        answer = LogprobHead(lm_head, fp32=True)(hidden, targets, temperature, *told)
    return learned(answer, upstream, hidden, lm_head.weight, of)


@pytest.mark.slow
@pytest.mark.parametrize("truncation", CUTS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("of", [("logprob",), ("entropy",), ("logprob", "entropy")], ids="+".join)
def test_over_the_kept_tokens_values_and_gradients_are_those_of_a_dense_softmax_over_them(truncation, temperature, of):
    ways = ("dense", "truncation", "support", "both")
    for want, *ours in zip(*(over_the_kept(way, truncation, temperature, of) for way in ways), strict=True):
        assert want.abs().max() > 1e-3
        assert (ours[0] - want).norm() <= 3e-6 * want.norm()
        assert torch.equal(ours[0], ours[1])
        assert torch.equal(ours[0], ours[2])


def test_a_token_that_was_not_kept_gets_no_gradient():
    lm_head, hidden, targets, _ = make()
    kept = kept_by(lm_head, hidden, targets, Truncation(top_k=3), 1.0)
    logprob, entropy = LogprobHead(lm_head, fp32=True)(hidden, targets, 1.0, Truncation(top_k=3))
    (logprob.sum() + entropy.sum()).backward()
    unused = ~kept.any(0)
    assert 0 < unused.sum() < VOCABULARY
    assert lm_head.weight.grad[unused].abs().max() == 0
    assert lm_head.weight.grad[~unused].abs().amin(dim=0).max() > 0


def test_two_kept_tokens_by_hand():
    # Logits 2, 1 and 5 less: of the first two p = e / (1 + e), and log p = -log(1 + 1 / e) = -0.3133.
    lm_head = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        lm_head.weight.copy_(torch.tensor([[2.0], [1.0], [-4.0]]))
    hidden = torch.ones(1, 1, requires_grad=True)
    logprob, entropy = LogprobHead(lm_head, fp32=True)(hidden, torch.tensor([0]), 1.0, Truncation(top_k=2))
    logprob.sum().backward()
    assert logprob.item() == pytest.approx(-0.313262, abs=1e-6)
    assert entropy.item() == pytest.approx(0.582203, abs=1e-6)  # 0.731059 * 0.313262 + 0.268941 * 1.313262
    assert lm_head.weight.grad[:, 0].tolist() == pytest.approx([0.268941, -0.268941, 0.0], abs=1e-6)


@pytest.mark.parametrize("way", ["truncation", "support"])
def test_a_sampled_token_outside_of_the_computed_support_stays_finite(way):
    lm_head, hidden, _, upstream = make()
    with torch.no_grad():
        logits = F.linear(hidden, lm_head.weight)
    best, least = logits.argmax(-1), logits.argmin(-1)
    given = {"truncation": (Truncation(top_k=1), None), "support": (None, best[:, None])}[way]
    answer = LogprobHead(lm_head, fp32=True)(hidden, least, 1.0, *given)
    want = torch.stack([logits.gather(1, best[:, None]), logits.gather(1, least[:, None])]).log_softmax(0)[1, :, 0]
    assert torch.allclose(answer[0], want, atol=1e-6)
    assert all(x.isfinite().all() for x in learned(answer, upstream, hidden, lm_head.weight, ("logprob", "entropy")))


def test_without_truncation_not_a_bit_changes():
    """The head as it was before it knew of truncation, in one chunk: log_softmax, and its gradient by hand."""
    lm_head, hidden, targets, upstream = make()
    ours = learned(
        LogprobHead(lm_head, fp32=True)(hidden, targets, 0.8, None, None),
        upstream,
        hidden,
        lm_head.weight,
        ("logprob", "entropy"),
    )
    h, w = hidden.detach(), lm_head.weight.detach()
    grad_weight = torch.zeros_like(w)
    for s in (slice(0, 3), slice(3, 6), slice(6, 7)):
        z = F.linear(h[s], w) * (1.0 / 0.8)
        log_p = z.log_softmax(-1)
        logprob, entropy = log_p.gather(-1, targets[s, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        again = z - (z.gather(-1, targets[s, None])[:, 0] - logprob)[:, None]
        p = again.exp()
        up = upstream * (1.0 / 0.8)
        grad = -(((again + entropy[:, None]) * up[1, s, None] + up[0, s, None]) * p)
        grad.scatter_add_(1, targets[s, None], up[0, s, None])
        assert torch.equal(ours[0][s], logprob)
        assert torch.equal(ours[1][s], entropy)
        assert torch.equal(ours[2][s], grad.matmul(w))
        grad_weight.addmm_(grad.t(), h[s])
    assert torch.equal(ours[3], grad_weight)


def test_truncation_holds_no_mask_for_backward():
    lm_head, hidden, targets, _ = make()
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        LogprobHead(lm_head, fp32=True)(hidden, targets, 1.0, Truncation(top_p=0.9))
    assert TOKENS * VOCABULARY not in held
    assert sorted(held)[-2:] == [TOKENS * HIDDEN, VOCABULARY * HIDDEN]
