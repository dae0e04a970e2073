"""Gradient checkpointing changes the memory of a step and none of its numbers."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from models import SIZES
from trainer.model.policy import load


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its config has a dropout, which must stay off: an engine has none."""
    folder = tmp_path_factory.mktemp("checkpointing")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=50, attention_dropout=0.5, initializer_range=0.2, **SIZES)).save_pretrained(
        folder
    )
    return folder


def answer(model, *, checkpointing, share_prompts):
    """What the policy says, its gradients by name, and how many bytes it kept for backward."""
    policy = load(str(model), dtype="float32", fp32_head=True, share_prompts=share_prompts, checkpointing=checkpointing)
    g = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, 50, (6,), generator=g).expand(4, 6)
    ids = torch.cat([prompt, torch.randint(1, 50, (4, 20), generator=g)], dim=1)
    mask = torch.ones(4, 25, dtype=torch.bool)
    mask[:, :5] = False
    kept = []

    def keep(tensor):
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = policy(ids, mask, 1.0)
    (torch.randn(mask.shape, generator=g) * out.logprobs + 0.1 * out.entropy).sum().backward()
    return out.logprobs.detach(), {name: p.grad for name, p in policy.named_parameters()}, sum(kept)


@pytest.mark.parametrize("share_prompts", [False, True], ids=["rows", "shared prompts"])
def test_with_gradient_checkpointing_the_same_is_said_and_learned_in_less_memory(model, share_prompts):
    said, gradients, kept = answer(model, checkpointing=False, share_prompts=share_prompts)
    again, recomputed, less = answer(model, checkpointing=True, share_prompts=share_prompts)
    torch.testing.assert_close(again, said, rtol=0, atol=1e-6)
    assert gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-6, msg=name)
    assert less < kept / 3
