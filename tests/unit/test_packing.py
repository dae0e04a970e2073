"""One packed row gives the numbers of padded rows and of each row alone, for tiny random models."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import trainer.model.attention
import trainer.model.packing
from rl.batch import micro_batches, take
from rl.types import Batch
from trainer.model.attention import NAME, PLAIN, check_split, packs
from trainer.model.packing import BUNDLE, pack
from trainer.model.policy import Policy

VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def policy_of(family="qwen2", *, tied=False, with_values=False):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, tie_word_embeddings=tied, initializer_range=0.1, **SIZES)
    hf = AutoModelForCausalLM.from_config(config)
    policy = Policy(hf, fp32_head=True, with_values=with_values, share_prompts=True)
    if with_values:
        torch.nn.init.normal_(policy.value_head.weight)
    return policy


def rows_of(*specification):
    """Right-padded (input_ids, mask) of rows given as (prompt tokens, sampled?-pattern of what follows)."""
    g = torch.Generator().manual_seed(1)
    length = max(len(prompt) + len(pattern) for prompt, pattern in specification)
    ids = torch.zeros(len(specification), length, dtype=torch.long)
    sampled = torch.zeros(len(specification), length, dtype=torch.bool)
    for r, (prompt, pattern) in enumerate(specification):
        reply = torch.randint(1, VOCABULARY, (len(pattern),), generator=g)
        ids[r, : len(prompt) + len(pattern)] = torch.cat([torch.tensor(prompt), reply])
        sampled[r, len(prompt) : len(prompt) + len(pattern)] = torch.tensor([c == "x" for c in pattern])
    return ids, sampled[:, 1:]


# Three prompts, their rows interleaved, replies of different lengths, two of them with a tool reply (.) between turns.
A, B, C = [5, 6, 7, 8], [5, 6], [9]
GROUPS = rows_of((A, "xxxx"), (B, "xx"), (A, "xx..xxx"), (C, "xxxxx"), (B, "xxx.x"), (A, "x"))


def answers(policy, ids, mask, layout):
    """Everything the policy says, and the gradient of a loss that uses all of it, by name.

    Layouts: "shared" and "packed" are ours; "padded" and "alone" are transformers' own attention, on all rows at once
    and on one at a time without its padding.
    """
    ours = layout in ("shared", "packed")
    policy.packs, policy.share_prompts = ours, layout == "shared"
    policy.hf.set_attn_implementation(NAME if ours else "sdpa")
    policy.zero_grad()
    g = torch.Generator().manual_seed(2)
    upstream = torch.randn(3, *mask.shape, generator=g)
    said = {n: torch.zeros(mask.shape) for n in ("logprobs", "entropy", "values")}
    for rows in [[r] for r in range(len(ids))] if layout == "alone" else [list(range(len(ids)))]:
        width = int(mask[rows].nonzero()[:, 1].max()) + 1 if mask[rows].any() else mask.shape[1]
        out = policy(ids[rows, : width + 1], mask[rows, :width], 0.7)
        parts = {n: getattr(out, n) for n in said if getattr(out, n) is not None}
        sum((u * part).sum() for u, part in zip(upstream[:, rows, :width], parts.values(), strict=False)).backward()
        said = {n: said[n] for n in parts}
        for name, part in parts.items():
            said[name][rows, :width] = part.detach()
    return said, {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def apart(one, other):
    """Norm of the difference over the norm of the second, of all tensors together."""
    assert one.keys() == other.keys()
    assert all(want.abs().max() > 1e-3 for want in other.values())
    flat, want = (torch.cat([x[n].double().flatten() for n in other]) for x in (one, other))
    return float((flat - want).norm() / want.norm())


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["padded", "alone"])
@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize(
    ("family", "tied", "with_values"),
    [("qwen2", False, False), ("qwen2", True, False), ("qwen2", True, True), ("llama", False, True)],
)
def test_packing_changes_neither_values_nor_gradients(family, tied, with_values, layout, reference):
    policy = policy_of(family, tied=tied, with_values=with_values)
    said, gradients = answers(policy, *GROUPS, layout)
    want, want_gradients = answers(policy, *GROUPS, reference)
    assert ("values" in said) == with_values
    assert gradients.keys() == dict(policy.named_parameters()).keys()
    assert apart(said, want) < 1e-6
    assert apart(gradients, want_gradients) < 1e-6


def test_a_long_completion_that_needs_no_mask_sees_its_prompt_as_well(monkeypatch):
    policy = policy_of()
    rows = rows_of((B, "xxxxxxxxx"), (B, "xx"), (B, "xx.xxxxx"))
    masked = answers(policy, *rows, "shared")
    monkeypatch.setattr(trainer.model.attention, "LONG", 4)
    monkeypatch.setattr(trainer.model.packing, "BUNDLE", 1)
    assert [s.mask is None for s in pack(*rows, share_prompts=True).segments] == [True, False, True, True]
    causal = answers(policy, *rows, "shared")
    assert apart(causal[0], masked[0]) < 1e-6
    assert apart(causal[1], masked[1]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("family", sorted(PLAIN))
def test_in_every_family_that_is_packed_nothing_leaks_between_sequences(family, layout):
    plain = {"use_sliding_window": False} if family in ("qwen2", "qwen3", "smollm3") else {}
    plain |= {"sliding_window": None} if family == "mistral" else {}
    sizes = SIZES | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **plain))
    policy = Policy(hf, fp32_head=True, with_values=False, share_prompts=True)
    assert policy.packs
    said, gradients = answers(policy, *GROUPS, layout)
    want, want_gradients = answers(policy, *GROUPS, "alone")
    assert apart(said, want) < 1e-6
    assert apart(gradients, want_gradients) < 1e-6


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    ],
)
def test_a_model_with_a_sliding_window_keeps_its_padded_rows_and_its_numbers(family, more):
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **more, pad_token_id=0))
    ids, mask = GROUPS
    with torch.no_grad():
        want = (hf(ids[:, :-1], use_cache=False).logits.float() / 0.7).log_softmax(-1).gather(-1, ids[:, 1:, None])
    policy = Policy(hf, fp32_head=True, with_values=False, share_prompts=True)
    assert not policy.packs
    assert not policy.share_prompts
    said = policy(ids, mask, 0.7).logprobs
    assert (said - torch.where(mask, want[..., 0], 0.0)).abs().max() < 2e-6


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mamba", "qwen3_next"])
def test_a_family_that_is_not_known_to_be_plain_is_not_packed(family):
    assert not packs(AutoConfig.for_model(family))


def test_a_packed_model_that_asks_for_special_attention_is_refused():
    policy = policy_of()
    policy.hf.get_submodule("model.layers.1.self_attn").sliding_window = 4  # pyright: ignore
    with pytest.raises(ValueError, match="sliding_window"):
        policy(*GROUPS, 0.7)
    with pytest.raises(ValueError, match="no padding"):
        policy.hf(GROUPS[0], attention_mask=torch.ones_like(GROUPS[0]))


def test_gradient_checkpointing_changes_no_gradient():
    policy = policy_of()
    _, want = answers(policy, *GROUPS, "shared")
    policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
    policy.hf.train()
    assert policy.hf.get_submodule("model.layers.0").gradient_checkpointing
    _, gradients = answers(policy, *GROUPS, "shared")
    assert all(torch.equal(gradients[n], want[n]) for n in want)


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_logprobs_are_those_of_the_plain_model_on_each_row_alone(layout):
    policy = policy_of()
    head = policy.hf.get_output_embeddings().weight
    ids, mask = GROUPS
    said, _ = answers(policy, ids, mask, layout)
    for r in range(len(ids)):
        with torch.no_grad():
            hidden = policy.hf.get_decoder()(input_ids=ids[r : r + 1, :-1], use_cache=False).last_hidden_state[0]
            want = (hidden @ head.t() / 0.7).log_softmax(-1)
        picked = want.gather(-1, ids[r, 1:, None])[:, 0]
        assert torch.allclose(said["logprobs"][r], torch.where(mask[r], picked, 0.0), atol=2e-6)


def test_no_completion_sees_another():
    policy = policy_of()
    ids, mask = GROUPS
    said, _ = answers(policy, ids, mask, "shared")
    other = ids.clone()
    other[0, 4] = (ids[0, 4] + 1) % VOCABULARY
    changed, _ = answers(policy, other, mask, "shared")
    difference = (said["logprobs"] - changed["logprobs"]).abs().amax(dim=1)
    assert difference[0] > 1e-3
    assert difference[1:].max() < 1e-6


def test_a_group_is_laid_out_as_one_prompt_and_its_completions():
    # Prompt 1 2; replies 3 4 and 5 6 7. The last token of a reply is only predicted, so it needs no column.
    ids = torch.tensor([[1, 2, 3, 4, 0], [1, 2, 5, 6, 7]])
    mask = torch.tensor([[False, True, True, False], [False, True, True, True]])
    packed = pack(ids, mask, share_prompts=True)
    assert packed.input_ids.tolist() == [[1, 2, 3, 5, 6]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 2, 3]]
    assert packed.source.tolist() == [1, 2, 1, 3, 4]
    prompt, replies = packed.segments
    assert prompt.mask is None, "simply causal"
    assert (replies.lengths, replies.prompt) == ((1, 2), 0)
    assert replies.mask.long().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]


def test_sequences_are_laid_end_to_end_when_nothing_is_shared():
    ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 0, 0]])
    mask = torch.tensor([[False, True, False, True], [False, True, False, False]])
    packed = pack(ids, mask, share_prompts=False)
    assert packed.input_ids.tolist() == [[1, 2, 1, 2, 3, 4]], "the shorter one first; its last token is only predicted"
    assert packed.position_ids.tolist() == [[0, 1, 0, 1, 2, 3]]
    assert packed.source.tolist() == [3, 5, 1]
    (segment,) = packed.segments
    assert segment.mask.long().tolist() == torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).tril().tolist()


@pytest.mark.parametrize("share", [False, True])
def test_the_budget_of_a_micro_batch_is_the_length_of_its_row(share):
    ids, mask = rows_of((A, "xxxx"), (A, "xx..xxx"), (B, "xx"), (B, "xxx.x"), (C, "xxxxx"), (C, "x"))
    zeros = torch.zeros(mask.shape)
    batch = Batch(
        input_ids=ids,
        mask=mask,
        rollout_logprobs=zeros,
        versions=zeros.long(),
        rewards=zeros[:, 0],
        group_ids=torch.arange(6) // 2,
    )
    (cut,) = micro_batches(batch, torch.arange(6), ranks=1, budget=20, share_prompts=share)
    lengths = []
    for rows in cut:
        part = take(batch, rows)
        lengths.append(pack(part.input_ids, part.mask, share_prompts=share).input_ids.shape[1])
    # Every prompt of p tokens (4, 2, 1) and reply of n makes p + n - 1; shared prompts count once.
    assert sum(lengths) == {False: (7 + 10) + (3 + 6) + (5 + 1), True: (4 + 3 + 6) + (2 + 1 + 4) + (1 + 4 + 0)}[share]
    assert max(lengths) <= 20
    assert len(lengths) == 2


def test_useful_tokens_are_counted_over_those_that_went_through_the_layers():
    policy = policy_of()
    ids, mask = rows_of((A, "xx"), (A, "xxxxxx"))
    for layout, counts in {"padded": [5 + 9, 2 * 9], "packed": [14, 14], "shared": [4 + 1 + 5, 10]}.items():
        policy.tokens.zero_()
        answers(policy, ids, mask, layout)
        assert policy.tokens.tolist() == counts


def test_a_long_sequence_attends_alone_and_needs_no_mask():
    mask = torch.ones(3, 2 * BUNDLE, dtype=torch.bool)
    mask[1:, 5:] = False
    packed = pack(torch.ones(3, 2 * BUNDLE + 1, dtype=torch.long), mask, share_prompts=False)
    assert [s.lengths for s in packed.segments] == [(5, 5), (2 * BUNDLE,)]
    assert packed.segments[1].mask is None


def test_rows_without_a_sampled_token_are_left_out():
    ids, mask = GROUPS
    empty = mask.clone()
    empty[3] = False
    packed = pack(ids, empty, share_prompts=True)
    assert packed.input_ids.shape == (1, 3 + sum([3, 6, 0]) + 1 + 2 + sum([1, 4]))
    assert len(packed.source) == int(empty.sum())
    policy = policy_of()
    said, _ = answers(policy, ids, empty, "shared")
    full, _ = answers(policy, ids, mask, "shared")
    assert said["logprobs"][3].abs().max() == 0
    assert torch.allclose(said["logprobs"][[0, 1, 2, 4, 5]], full["logprobs"][[0, 1, 2, 4, 5]], atol=1e-6)


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_a_micro_batch_without_sampled_tokens_still_runs_backward(layout):
    policy = policy_of(with_values=True)
    ids, mask = GROUPS
    _, gradients = answers(policy, ids[:1], torch.zeros_like(mask[:1]), layout)
    assert gradients, "ZeRO communicates inside backward: every layer must take part"
    assert all(g.abs().max() == 0 for g in gradients.values())


def test_the_gradient_is_the_same_bit_for_bit_every_time():
    policy = policy_of()
    ids, mask = rows_of(*[([1 + g, 2, 3], "xxxx") for _ in range(96) for g in range(4)])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _, first = answers(policy, ids, mask, "shared")
        for _ in range(3):
            _, again = answers(policy, ids, mask, "shared")
            assert [name for name in first if not torch.equal(first[name], again[name])] == []
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("family", "ranks", "says"),
    [
        ("qwen2", 4, r"must divide the model's attention heads \(4\) and key-value heads \(2\)"),
        ("qwen2", 3, "must divide"),
        ("gemma", 2, "rows of gemma stay padded"),
    ],
)
def test_rows_that_ranks_cannot_share_are_refused(family, ranks, says):
    with pytest.raises(ValueError, match=says):
        check_split(AutoConfig.for_model(family, **SIZES), ranks)
    check_split(AutoConfig.for_model("qwen2", **SIZES), 2)
