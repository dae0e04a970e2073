"""What the engine may not sample has the probability 0 in the trainer too: by hand, and against a dense softmax."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trainer.model.head
from rl.config import Config, RolloutConfig
from rl.sampling.forbidden import Forbidden, places, word_ids
from rl.sampling.truncation import Truncation, keep
from rl.types import Data
from rl.validate import check
from trainer.model.head import LogprobHead


class Words:
    """A tokenizer of words: every word and every space is a token, but a space joins a short word after it."""

    vocabulary = {"": 0, "<eos>": 1, "no": 2, " no": 3, "way": 4, " ": 5, "x": 6}

    def encode(self, text, add_special_tokens):
        assert add_special_tokens is False
        if text in self.vocabulary:
            return [self.vocabulary[text]] if text.strip() else []
        head, _, rest = text.partition(" ")
        words = ([head] if head else [" "]) + ([rest] if rest else [])
        return [self.vocabulary.get(word, 6) for word in words]


def test_a_place_counts_the_sampled_tokens_of_its_own_reply():
    # The second row has two replies with tool tokens between them: each is a request of its own.
    mask = torch.tensor([[False, True, True, True, False], [True, True, False, True, True]])
    assert places(mask)[mask].tolist() == [0, 1, 2, 0, 1, 0, 1]


def test_stop_tokens_are_forbidden_until_min_tokens():
    rule = Forbidden(min_tokens=2, stop_ids=(1, 7))
    mask = torch.tensor([[False, True, True, True], [True, False, True, False]])
    ids = rule.ids(torch.zeros(2, 5, dtype=torch.long), mask)
    assert ids.tolist() == [[1, 7], [1, 7], [-1, -1], [1, 7], [1, 7]]


def test_the_last_token_of_a_bad_word_is_forbidden_after_the_others_and_not_across_the_prompt():
    rule = Forbidden(words=((5,), (2, 3), (2, 2, 4)))
    # The prompt ends with 2, and the reply is 3 2 2 9 2: the prompt's 2 begins no word.
    input_ids = torch.tensor([[8, 2, 3, 2, 2, 9, 2]])
    mask = torch.tensor([[False, True, True, True, True, True]])
    assert rule.ids(input_ids, mask).tolist() == [[5, -1, -1], [5, -1, -1], [5, 3, -1], [5, 3, 4], [5, -1, -1]]


def test_nothing_forbidden_is_padding_alone():
    assert Forbidden().ids(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)).tolist() == [
        [-1],
        [-1],
    ]


def test_a_bad_word_has_a_spelling_with_a_space_where_that_is_another_token():
    assert word_ids(Words(), ["no"]) == ((2,), (3,))
    assert word_ids(Words(), [" no"]) == ((2,), (3,)), "a space in front changes nothing"
    assert word_ids(Words(), ["way"]) == ((4,),), "with a space it has two tokens, and its end is forbidden anyway"
    with pytest.raises(ValueError, match=r"rollout\.bad_words: ' ' has no token of its own"):
        word_ids(Words(), [" "])
    with pytest.raises(ValueError, match=r"has 130 spellings with 130 tokens, and vLLM takes at most 128 with 1024"):
        word_ids(Words(), ["no"] * 65)


TOKENS, HIDDEN, VOCABULARY = 7, 8, 23


def learned(way, truncation, of):
    """(logprob, entropy, grad_hidden, grad_weight), from our head or from a dense softmax in fp64."""
    g = torch.Generator().manual_seed(0)
    lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    with torch.no_grad():
        lm_head.weight.copy_(torch.randn(VOCABULARY, HIDDEN, generator=g) * 0.5)
    hidden = torch.randn(TOKENS, HIDDEN, generator=g).requires_grad_()
    banned = torch.stack([torch.randperm(VOCABULARY, generator=g)[:9] for _ in range(TOKENS)])
    banned[2:5, 4:] = -1
    banned[6] = -1
    allowed = torch.ones(TOKENS, VOCABULARY + 1, dtype=torch.bool)
    allowed = allowed.scatter(1, banned.where(banned >= 0, VOCABULARY), False)[:, :-1]
    with torch.no_grad():
        logits = F.linear(hidden, lm_head.weight).masked_fill(~allowed, -torch.inf) / 0.7
    kept = keep(logits, truncation) if truncation else allowed
    targets = torch.where(kept, torch.rand(kept.shape, generator=g), -1.0).argmax(1)
    upstream = torch.randn(2, TOKENS, generator=g)
    if way == "dense":
        log_p = (
            (F.linear(hidden.double(), lm_head.weight.double()) / 0.7).masked_fill(~kept, -torch.inf).log_softmax(-1)
        )
        finite = log_p.masked_fill(~kept, 0.0)
        answer = finite.gather(1, targets[:, None])[:, 0], -(log_p.exp() * finite).sum(-1)
    else:
        answer = LogprobHead(lm_head, fp32=True)(hidden, targets, 0.7, truncation, None, banned)
    sum(
        (u * x).sum() for name, u, x in zip(("logprob", "entropy"), upstream, answer, strict=True) if name in of
    ).backward()
    return *(x.detach() for x in answer), hidden.grad, lm_head.weight.grad


@pytest.mark.parametrize("of", [("logprob",), ("logprob", "entropy")], ids="+".join)
@pytest.mark.parametrize("truncation", [None, Truncation(top_p=0.6, top_k=9), Truncation(min_p=0.1)], ids=str)
def test_values_and_gradients_are_those_of_a_softmax_over_what_is_allowed(truncation, of, monkeypatch):
    monkeypatch.setattr(trainer.model.head, "CHUNK", 3)
    for ours, want in zip(*(learned(way, truncation, of) for way in ("head", "dense")), strict=True):
        assert want.abs().max() > 1e-3
        assert ours.isfinite().all()
        assert (ours - want).norm() <= 3e-6 * want.norm()


def test_two_allowed_tokens_by_hand():
    # Logits 2, 1 and 9, the last forbidden: p = e / (1 + e), and log p = -log(1 + 1 / e) = -0.3133.
    lm_head = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        lm_head.weight.copy_(torch.tensor([[2.0], [1.0], [9.0]]))
    hidden = torch.ones(1, 1, requires_grad=True)
    logprob, entropy = LogprobHead(lm_head, fp32=True)(hidden, torch.tensor([0]), 1.0, None, None, torch.tensor([[2]]))
    logprob.sum().backward()
    assert logprob.item() == pytest.approx(-0.313262, abs=1e-6)
    assert entropy.item() == pytest.approx(0.582203, abs=1e-6)
    assert lm_head.weight.grad[:, 0].tolist() == pytest.approx([0.268941, -0.268941, 0.0], abs=1e-6)


def test_a_token_that_was_forbidden_and_sampled_all_the_same_has_the_probability_0():
    lm_head = nn.Linear(1, 3, bias=False)
    logprob, _ = LogprobHead(lm_head, fp32=True)(
        torch.ones(1, 1), torch.tensor([2]), 1.0, None, None, torch.tensor([[2]])
    )
    assert logprob.item() == -torch.inf


CONFIG = Config(
    name="x", model="x", data=Data(train=[]), reward=lambda reply: 0.0, rollout=RolloutConfig(max_tokens=20)
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_tokens": 21}, r"rollout\.min_tokens=21 must be from 0 .* to rollout\.max_tokens=20"),
        ({"min_tokens": -1}, r"rollout\.min_tokens=-1 must be from 0"),
        ({"stop": ("",)}, r"rollout\.stop has an empty text"),
        ({"bad_words": ("a", " ")}, r"rollout\.bad_words has an empty text"),
        ({"stop_token_ids": (3, -2)}, r"rollout\.stop_token_ids has -2"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        check(replace(CONFIG, rollout=replace(CONFIG.rollout, **change)))


def test_one_stop_text_without_a_tuple_is_refused_with_the_right_form():
    assert RolloutConfig.right_form("stop", "</answer>") == "is text: write a tuple, stop=('</answer>',)"
    assert RolloutConfig.right_form("max_tokens", "9") is None
