"""Are the policy's log-probabilities the model's own? Its plain forward, without packing or our softmax."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from trainer.model.answer import Answer

LIMIT = {"float32": 1e-4, "bfloat16": 0.15}
"""Largest mean |d| in nats at which the two count as equal. Clean models show 2e-6 and 0.03."""
TEMPERATURE = 0.7
PROMPT, REPLY = 9, 15
"""Tokens of the random sequences; two of three share their prompt."""


def own_forward(
    hf: PreTrainedModel,
    input_ids: Int[Tensor, "B S"],
    mask: Bool[Tensor, "B T"],
    temperature: float,
    implementation: str = "eager",
) -> Answer:
    """Log-probabilities and entropy (nats) at the columns of `mask`, 0 elsewhere, from the logits that the model itself
    returns for right-padded rows. The softmax runs in fp32. `implementation` is transformers' name of an attention; by
    default it is the one that transformers spells out."""
    attention = hf.config._attn_implementation
    hf.set_attn_implementation(implementation)
    try:
        logits: Tensor = hf(input_ids=input_ids[:, :-1], use_cache=False).logits
    finally:
        hf.set_attn_implementation(attention)
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    chosen = log_p.gather(-1, input_ids[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
    return Answer(logprobs=chosen.where(mask, 0.0), entropy=entropy.where(mask, 0.0))


@torch.no_grad()
def check_own_forward(policy: Any, model: Any, *, name: str, dtype: str, device: torch.device) -> Float[Tensor, ""]:
    """The largest |d| in nats between policy and model on three short random sequences.

    `model` runs the policy (a `Policy`, or DeepSpeed's engine around one). A collective over all ranks. Raises
    ValueError, with the family, the size of the difference and its likely cause, when they are not equal.
    """
    text = policy.hf.config.get_text_config()
    ids = torch.randint(0, text.vocab_size, (3, PROMPT + REPLY), generator=torch.Generator().manual_seed(0))
    ids[1, :PROMPT] = ids[0, :PROMPT]
    ids = ids.to(device)
    mask = torch.zeros(3, PROMPT + REPLY - 1, dtype=torch.bool, device=device)
    mask[:, PROMPT - 1 :] = True
    counted = policy.tokens.clone()

    def difference() -> Tensor:
        return (model(ids, mask, TEMPERATURE).logprobs - own)[mask].abs()

    shared, policy.ulysses = policy.ulysses, None
    try:
        own = model(ids, mask, TEMPERATURE, plain=True).logprobs
        gap, cause = difference(), "the logits that the trainer computes from its hidden states"
        if not gap.mean() <= LIMIT[dtype] and policy.packs:
            policy.packs = False
            if difference().mean() <= LIMIT[dtype]:
                cause = "packed rows: attention of this family needs more than a causal mask (trainer/model/attention)"
            policy.packs = True
    finally:
        policy.ulysses = shared
        policy.tokens.copy_(counted)
    if not gap.mean() <= LIMIT[dtype]:
        raise ValueError(
            f"the trainer's log-probabilities of {name} ({text.model_type}) are not the model's own: on {len(gap)} "
            f"random tokens they differ by {gap.mean():.1e} nats on average (limit {LIMIT[dtype]:g}) and by "
            f"{gap.max():.1e} at most. Likely cause: {cause}. This family cannot be trained here; please report it"
        )
    return gap.max()
