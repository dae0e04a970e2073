"""A step with masked rows learns, in a real learner, what a step without those rows learns."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from live import engine_config
from pair import make_learner
from rl.batch import collate, trajectory
from rl.config import TrainerConfig
from rl.objectives import GRPO
from rl.objectives.advantages import spread
from rl.types import Batch, Completion, Prompt, Trajectory


@dataclass(frozen=True, kw_only=True)
class PaidAsItIs(GRPO):
    """No baseline, so that rows do not depend on each other; the KL keeps every row in the step."""

    group_relative: ClassVar[bool] = False

    def advantages(self, batch: Batch) -> torch.Tensor:
        return spread(batch.rewards, batch.mask)


def rows() -> list[Trajectory]:
    """Two prompts of four replies; two replies of the first and one of the second were cut off."""
    g, made = torch.Generator().manual_seed(1), []
    for ordinal in range(2):
        prompt = Prompt(ordinal=ordinal, token_ids=torch.randint(3, 90, (5,), generator=g).tolist(), task={})
        for i in range(4):
            ids = torch.randint(3, 90, (4 + 3 * i,), generator=g).tolist()
            cut = i >= 2 + ordinal
            reply = Completion(
                token_ids=ids,
                logprobs=[-4.5] * len(ids),
                versions=[0] * len(ids),
                finish_reason="length" if cut else "stop",
            )
            made.append(trajectory(prompt, reply, 0.5 + i, {}, mask_truncated=True))
    return made


@pytest.mark.parametrize("average_over", ["tokens", "sequences", "constant"])
def test_masked_rows_change_no_number_of_a_step(tiny: Callable, average_over: str) -> None:
    objective = PaidAsItIs(kl_coef=0.1, average_over=average_over)
    trainer = TrainerConfig(lr=1e-3, minibatches=1, micro_batch_tokens=32)
    config = engine_config(tiny(), objective=objective, trainer=trainer, old_logprobs="recompute")
    made = rows()
    assert [t.trained for t in made] == [True, True, False, False, True, True, True, False]
    found = []
    for batch in (collate(made), collate([t for t in made if t.trained])):
        learner = make_learner(config)
        metrics = [learner.step(batch) for _ in range(2)]
        found.append((metrics, learner.digests(), learner.logprobs(batch)[batch.mask]))
    (masked, weights, logprobs), (without, others, plain) = found
    for one, other in zip(masked, without, strict=True):
        assert one["actor/grad_norm"] > 0.01
        for name in ("actor/loss", "actor/grad_norm", "actor/kl_loss", "rollout_corr/kl", "perf/trained_tokens"):
            assert one[name] == other[name], name
    assert weights == others
    assert torch.equal(logprobs, plain)


def test_fewer_rows_than_minibatches_are_fewer_optimizer_steps(tiny: Callable) -> None:
    trainer = TrainerConfig(lr=1e-3, minibatches=8)
    config = engine_config(tiny(), objective=replace(PaidAsItIs(), kl_coef=0.0), trainer=trainer)
    metrics = make_learner(config).step(collate(rows()))
    assert metrics["actor/grad_norm"] > 0.0
