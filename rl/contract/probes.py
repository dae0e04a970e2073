"""How does the gradient of one token answer to its log-probability, its ratio and its advantage?

Replies of one token, each with its own numbers: one call of `loss` gives a whole curve. The checks before these have
shown that rows do not depend on one another.
"""

import torch
from torch import Tensor

from rl.contract.run import Outcome, run
from rl.contract.scene import Scene
from rl.objectives.objective import Objective
from rl.types import Batch, PolicyOutput


def one_token(
    *,
    logprobs: Tensor,
    old: Tensor,
    ref: Tensor | None = None,
    rewards: Tensor | None = None,
    values: Tensor | None = None,
) -> Scene:
    """N replies of one token with these numbers [N], two of each group; entropies and rewards are 1 by default."""
    n = len(logprobs)
    mask = torch.tensor([[False, True]]).expand(n, 2)

    def column(x: Tensor) -> Tensor:
        return torch.stack([torch.zeros(n), x], dim=1)

    batch = Batch(
        input_ids=torch.ones(n, 3, dtype=torch.long),
        mask=mask,
        rollout_logprobs=column(old),
        versions=torch.where(mask, 0, -1),
        rewards=torch.ones(n) if rewards is None else rewards,
        group_ids=torch.arange(n) // 2,
        old_logprobs=column(old),
        ref_logprobs=column(logprobs if ref is None else ref),
        values=column(torch.zeros(n) if values is None else values),
    )
    policy = PolicyOutput(logprobs=column(logprobs), entropy=mask.float(), values=batch.values)
    return Scene(batch=batch, policy=policy)


def answer(objective: Objective, scene: Scene, advantages: Tensor | None) -> Outcome:
    """The outcome with every token's weight 1; without advantages [N], the objective computes its own."""
    given = None if advantages is None else torch.stack([torch.zeros_like(advantages), advantages], dim=1)
    return run(objective, scene, given=given, weights=scene.batch.mask.float())


def pull(
    objective: Objective, advantage: Tensor, logp: Tensor, drift: Tensor, from_ref: Tensor | None = None
) -> Tensor:
    """How strongly a token with this advantage is made more likely [N], minus the same without an advantage.

    `drift` is its log-ratio to the old policy in nats, `from_ref` that to the reference (default: 0). This is the
    gradient's negative, so REINFORCE gives the advantage.
    """
    n = len(advantage)
    ref = logp if from_ref is None else logp - from_ref
    scene = one_token(logprobs=logp.repeat(2), old=(logp - drift).repeat(2), ref=ref.repeat(2))
    both = answer(objective, scene, torch.cat([advantage, torch.zeros(n)])).logprobs[:, 1]
    return both[n:] - both[:n]


def grid(*axes: list[float]) -> list[Tensor]:
    """All combinations, as one tensor [N] for each axis."""
    return list(torch.cartesian_prod(*[torch.tensor(axis) for axis in axes]).unbind(dim=1))


def nearly(x: Tensor, constant: float | None = None, within: float = 0.02) -> bool:
    """Whether all numbers are within 2 % of a constant, or of their mean, which is not 0."""
    middle = float(x.mean()) if constant is None else constant
    return bool(((x - middle).abs() <= within * abs(middle)).all()) and middle != 0.0
