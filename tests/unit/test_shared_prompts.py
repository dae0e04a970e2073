"""A group's prompt computed once gives the numbers of separate rows, for a tiny random model."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from trainer.model import Policy
from trainer.shared_prompts import pack

VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "sdpa",
}


def policy_of(family="qwen2", *, tied=False, with_values=False):
    torch.manual_seed(0)
    kinds = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
    config_class, model_class = kinds[family]
    hf = model_class(config_class(tie_word_embeddings=tied, initializer_range=0.2, **SIZES))
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


def answers(policy, ids, mask, *, share):
    """Everything the policy says, and the gradient of a loss that uses all of it, by name."""
    policy.share_prompts = share
    policy.zero_grad()
    out = policy(ids, mask, 0.7)
    g = torch.Generator().manual_seed(2)
    upstream = torch.randn(3, *mask.shape, generator=g)
    loss = (upstream[0] * out.logprobs + upstream[1] * out.entropy).sum()
    if out.values is not None:
        loss = loss + (upstream[2] * out.values).sum()
    loss.backward()
    said = {n: getattr(out, n).detach() for n in ("logprobs", "entropy", "values") if getattr(out, n) is not None}
    return said, {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "tied", "with_values"),
    [("qwen2", False, False), ("qwen2", True, False), ("qwen2", True, True), ("llama", False, True)],
)
def test_sharing_prompts_changes_neither_values_nor_gradients(family, tied, with_values):
    policy = policy_of(family, tied=tied, with_values=with_values)
    said, gradients = answers(policy, *GROUPS, share=True)
    said_apart, gradients_apart = answers(policy, *GROUPS, share=False)
    assert ("values" in said) == with_values
    for name, want in said_apart.items():
        assert want.abs().max() > 0.1
        assert (said[name] - want).abs().max() < 1e-6 * (1 + want.abs().max()), name
    assert gradients.keys() == gradients_apart.keys() == dict(policy.named_parameters()).keys()
    for name, want in gradients_apart.items():
        assert (gradients[name] - want).abs().max() < 1e-6 * (1 + want.abs().max()), name


@pytest.mark.parametrize("share", [True, False])
def test_logprobs_are_those_of_the_plain_model_on_each_row_alone(share):
    policy = policy_of()
    head = policy.hf.get_output_embeddings().weight
    ids, mask = GROUPS
    said, _ = answers(policy, ids, mask, share=share)
    for r in range(len(ids)):
        with torch.no_grad():
            hidden = policy.hf.get_decoder()(input_ids=ids[r : r + 1, :-1], use_cache=False).last_hidden_state[0]
            want = (hidden @ head.t() / 0.7).log_softmax(-1)
        picked = want.gather(-1, ids[r, 1:, None])[:, 0]
        assert torch.allclose(said["logprobs"][r], torch.where(mask[r], picked, 0.0), atol=2e-6)


def test_no_completion_sees_another():
    policy = policy_of()
    ids, mask = GROUPS
    said, _ = answers(policy, ids, mask, share=True)
    other = ids.clone()
    other[0, 4] = (ids[0, 4] + 1) % VOCABULARY
    changed, _ = answers(policy, other, mask, share=True)
    difference = (said["logprobs"] - changed["logprobs"]).abs().amax(dim=1)
    assert difference[0] > 1e-3
    assert difference[1:].max() < 1e-6


def test_a_group_is_laid_out_as_one_prompt_and_its_completions():
    # Prompt 1 2; replies 3 4 and 5 6 7. The last token of a reply is only predicted, so it needs no column.
    ids = torch.tensor([[1, 2, 3, 4, 0], [1, 2, 5, 6, 7]])
    mask = torch.tensor([[False, True, True, False], [False, True, True, True]])
    packed = pack(ids, mask)
    assert packed.input_ids.tolist() == [[1, 2, 3, 5, 6]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 2, 3]]
    assert packed.source.tolist() == [1, 2, 1, 3, 4]
    assert packed.attention[0, 0].long().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]


def test_rows_without_a_sampled_token_are_left_out():
    ids, mask = GROUPS
    empty = mask.clone()
    empty[3] = False
    packed = pack(ids, empty)
    assert len(packed.input_ids) == 2
    assert len(packed.source) == int(empty.sum())
    policy = policy_of()
    said, _ = answers(policy, ids, empty, share=True)
    full, _ = answers(policy, ids, mask, share=True)
    assert said["logprobs"][3].abs().max() == 0
    assert torch.allclose(said["logprobs"][[0, 1, 2, 4, 5]], full["logprobs"][[0, 1, 2, 4, 5]], atol=1e-6)


@pytest.mark.parametrize("share", [True, False])
def test_a_micro_batch_without_sampled_tokens_still_runs_backward(share):
    policy = policy_of(with_values=True)
    ids, mask = GROUPS
    _, gradients = answers(policy, ids[:1], torch.zeros_like(mask[:1]), share=share)
    assert gradients, "ZeRO communicates inside backward: every layer must take part"
    assert all(g.abs().max() == 0 for g in gradients.values())
