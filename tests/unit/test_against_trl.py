"""The same loss and gradient as TRL 1.16 on the same random tensors, where TRL has the same objective.

TRL's loss is a method of its trainer; it is called here on a stub that holds its settings and answers with our
log-probabilities. TRL is a tool of these tests (the dev extra), never of the framework.
"""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rl.loss import full_loss
from rl.objectives import CISPO, DAPO, GMPO, GRPO, GSPO, SAPO, DrGRPO
from rl.objectives.corrections import Uncorrected
from rl.reduce import Totals, loss_weights
from rl.types import PolicyOutput, Step

ROWS, COLUMNS = 6, 9


@pytest.fixture(scope="module")
def trainers():
    """TRL's trainers by their loss. Imported here: TRL takes 7 s, and both lanes collect this file."""
    pytest.importorskip("trl", reason="TRL is not installed: scripts/setup --dev brings it")
    from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
    from trl.trainer.grpo_trainer import GRPOTrainer

    return defaultdict(lambda: GRPOTrainer, gmpo=GMPOTrainer)


def tensors():
    g = torch.Generator().manual_seed(3)
    mask = torch.arange(COLUMNS)[None] < torch.tensor([9, 4, 1, 7, 5, 8])[:, None]
    old = -torch.rand(ROWS, COLUMNS, generator=g) - 0.2
    now = old + 0.4 * torch.randn(ROWS, COLUMNS, generator=g)
    ref = old + 0.3 * torch.randn(ROWS, COLUMNS, generator=g)
    return mask, old, now, ref, torch.randn(ROWS, generator=g)


def of_trl(trainer, loss_type, level, low, high, beta):
    """TRL's loss and its gradient."""
    mask, old, now, ref, advantages = tensors()
    now.requires_grad_()
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction=None: x
    )
    args = SimpleNamespace(
        delta=None,
        use_bias_correction_kl=False,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        steps_per_generation=1,
    )
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (now, torch.zeros_like(now), None),
        _metrics={"eval": defaultdict(list)},
        _entropy_bonus_enabled=False,
        accelerator=accelerator,
        args=args,
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=1,
        epsilon_high=high,
        epsilon_low=low,
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=16,
        model=SimpleNamespace(training=False),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_adaptive_entropy=False,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
    )
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 2, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 2, dtype=torch.long),
        "completion_ids": torch.zeros(ROWS, COLUMNS, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(stub, None, inputs)
    loss.backward()
    return float(loss.detach()), now.grad


def of_ours(objective):
    """Ours, averaged as the learner does it, in one piece."""
    mask, old, now, ref, advantages = tensors()
    now.requires_grad_()
    batch = Step(
        input_ids=torch.zeros(ROWS, COLUMNS + 1, dtype=torch.long),
        mask=mask,
        rollout_logprobs=old,
        versions=torch.zeros(ROWS, COLUMNS, dtype=torch.long),
        rewards=torch.zeros(ROWS),
        group_ids=torch.zeros(ROWS, dtype=torch.long),
        old_logprobs=old,
        ref_logprobs=ref,
    )
    policy = PolicyOutput(logprobs=now, entropy=torch.zeros_like(now))
    loss, _ = full_loss(objective, Uncorrected(), policy, batch, advantages[:, None] * mask)
    totals = Totals(tokens=int(mask.sum()), sequences=ROWS, horizon=16)
    total = torch.where(mask, loss * loss_weights(mask, objective.average_over, totals), 0.0).sum()
    total.backward()
    return float(total.detach()), now.grad


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(
    ("objective", "trl"),
    [
        (GRPO(average_over="sequences"), ("grpo", "token", 0.2, 0.2)),
        (GRPO(average_over="tokens"), ("bnpo", "token", 0.2, 0.2)),
        (DAPO(), ("dapo", "token", 0.2, 0.28)),
        (DrGRPO(), ("dr_grpo", "token", 0.2, 0.2)),
        (GSPO(clip_low=0.03, clip_high=0.04), ("grpo", "sequence", 0.03, 0.04)),
        (CISPO(clip_high=0.5), ("cispo", "token", 0.2, 1.5)),
        (SAPO(), ("sapo", "token", 0.2, 0.2)),
        (GMPO(clip_low=0.2, clip_high=0.3), ("gmpo", "token", 0.2, 0.3)),
    ],
    ids=["GRPO", "GRPO over tokens", "DAPO", "DrGRPO", "GSPO", "CISPO", "SAPO", "GMPO"],
)
def test_loss_and_gradient_are_those_of_trl(trainers, objective, trl, beta):
    want, want_grad = of_trl(trainers[trl[0]], *trl, beta)
    got, got_grad = of_ours(replace(objective, kl_coef=beta))
    assert got == pytest.approx(want, abs=1e-6)
    assert torch.allclose(got_grad, want_grad, atol=1e-6)
    assert want_grad.abs().max() > 1e-3
