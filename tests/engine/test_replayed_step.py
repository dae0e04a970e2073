"""A step that replays the experts which its own routers choose learns the same; with others it learns from those."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from cases import nightly_unless
from live import engine_config
from pair import make_learner
from rl.batch import collate, trajectory
from rl.config import TrainerConfig
from rl.objectives import GRPO
from rl.types import Batch, Completion, Prompt

MOE = {
    "family": "qwen3_moe",
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "experts": 3.0,
}


def batch_of(experts: Callable[[int], torch.Tensor]) -> Batch:
    """Two groups of two replies; `experts` gives those of so many tokens."""
    g, rows = torch.Generator().manual_seed(1), []
    for ordinal in range(2):
        prompt = Prompt(ordinal=ordinal, token_ids=torch.randint(3, 90, (5,), generator=g).tolist(), task={})
        for i in range(2):
            ids = torch.randint(3, 90, (6 + 3 * i,), generator=g).tolist()
            reply = Completion(
                token_ids=ids,
                logprobs=[-4.5] * len(ids),
                versions=[0] * len(ids),
                finish_reason="stop",
                experts=experts(len(ids) + 4),
            )
            rows.append(trajectory(prompt, reply, float(i), {}))
    return collate(rows)


@pytest.mark.parametrize("checkpointing", nightly_unless(bool, [True, False]))
def test_a_step_replays_experts_and_counts_what_its_routers_would_have_chosen(
    tiny: Callable, checkpointing: bool
) -> None:
    trainer = TrainerConfig(lr=1e-3, minibatches=1, micro_batch_tokens=32, gradient_checkpointing=checkpointing)
    config = engine_config(tiny(**MOE), objective=GRPO(kl_coef=0.1), trainer=trainer, old_logprobs="recompute")
    g = torch.Generator().manual_seed(3)
    given = batch_of(lambda n: torch.rand(n, 2, 4, generator=g).argsort(-1)[..., :2].to(torch.uint8))
    found = {}
    for name, batch in {"own": replace(given, experts=None), "given": given}.items():
        learner = make_learner(config)
        counted = learner.own_routing(given)[1]
        metrics = learner.step(batch)
        found[name] = metrics, learner.digests(), counted
    own, digests, (moved, tokens, moved_pairs, pairs) = found["own"]
    assert "rollout_corr/rerouted_frac" not in own
    metrics, others, _ = found["given"]
    assert others != digests
    assert 0.5 < moved / tokens <= 1
    assert 0.5 < moved_pairs / pairs < 1
    # The first layer's routers see the same in both passes, the second's other hidden states.
    assert metrics["rollout_corr/rerouted_tokens_frac"] == pytest.approx(moved / tokens, abs=0.15)
    assert metrics["rollout_corr/rerouted_frac"] == pytest.approx(moved_pairs / pairs, abs=0.15)
    assert metrics["actor/grad_norm"] > 0.01
    # The reference replays too, so at equal weights the KL is zero.
    assert metrics["actor/kl_loss"] == pytest.approx(0.0, abs=1e-6)
    # Nothing stays behind for a pass without experts.
    assert torch.equal(learner.logprobs(replace(given, experts=None)), learner.logprobs(replace(given, experts=None)))
    assert not torch.equal(learner.logprobs(given), learner.logprobs(replace(given, experts=None)))
