"""What does one output of vLLM say? Its tokens, each with its log-probability and its weight version."""

import torch
from vllm.outputs import CompletionOutput

from rl.types import Completion


def completion(done: CompletionOutput, prompt_tokens: int, cached_prompt_tokens: int) -> Completion:
    """vLLM's output for a prompt of so many tokens as a `Completion`.

    A missing log-probability becomes NaN, which the loop quarantines.
    """
    token_ids = list(done.token_ids)
    steps = done.logprobs or [{}] * len(token_ids)
    spans = done.weight_versions or []
    version_at = {position: int(span.version) for span in spans for position in range(span.start, span.end)}
    whole = version_at.keys() == set(range(len(token_ids)))
    assert whole, f"vLLM's weight versions do not cover all {len(token_ids)} tokens: {spans}"
    reason = done.finish_reason
    assert reason == "stop" or reason == "length" or reason == "abort", f"vLLM ended a request with {reason!r}"
    support = done.sampling_mask.token_ids if done.sampling_mask else None
    if support is not None:
        kept = all(token in ids for token, ids in zip(token_ids, support, strict=True))
        assert kept, "vLLM sampled a token outside of the set that it reports as kept"
    experts = None if done.routed_experts is None else torch.from_numpy(done.routed_experts)
    if experts is not None:
        expected = prompt_tokens + len(token_ids) - 1
        assert len(experts) == expected, f"vLLM reports the experts of {len(experts)} tokens, not of {expected}"
    return Completion(
        token_ids=token_ids,
        logprobs=[
            step[token].logprob if step and token in step else float("nan")
            for step, token in zip(steps, token_ids, strict=True)
        ],
        versions=[version_at[position] for position in range(len(token_ids))],
        finish_reason=reason,
        cached_prompt_tokens=cached_prompt_tokens,
        support=support,
        experts=experts,
    )
