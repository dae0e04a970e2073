"""On which synthetic steps is a contract tried? Awkward ones, with the current policy's numbers and their changes."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rl.types import Batch, PolicyOutput, columns, needed

ROWS = [
    *[(7, 2, 7, 0.0), (3, 1, 10, 0.3), (7, 3, 4, 1.0), (5, 2, 11, -0.5), (3, 1, 6, 0.7), (5, 4, 10, 1.0)],
    *[(7, 2, 9, 1.5), (3, 1, 8, 0.1), (9, 3, 8, 0.5), (9, 1, 5, 0.5), (9, 2, 10, 0.5)],
]
"""Group, first and last column, reward. The first of each group has its lowest reward: raising it changes its rank."""
ONE_TOKEN, EQUAL = 2, (8, 9, 10)
"""The row of one token, and the rows of the group whose rewards are all equal."""
WIDTH = 12


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A step with every optional column, and the current policy on it."""

    batch: Batch
    policy: PolicyOutput

    def each(self, change: Callable[[Tensor], Tensor]) -> "Scene":
        """The same with every tensor changed."""
        batch: dict[str, Any] = {name: change(x) for name, x in columns(self.batch).items()}
        policy: dict[str, Any] = {
            f.name: change(x) for f in fields(self.policy) if (x := getattr(self.policy, f.name)) is not None
        }
        return Scene(batch=Batch(**batch), policy=PolicyOutput(**policy))

    def rows(self, chosen: Tensor) -> "Scene":
        """The chosen rows in this order; a row may come several times."""
        return self.each(lambda x: x[chosen])

    def padded(self, width: int) -> "Scene":
        """With so many more columns of padding."""
        return self.each(lambda x: x if x.dim() == 1 else torch.cat([x, x.new_zeros(len(x), width)], dim=1))

    def moved(self, by: Tensor, room: int) -> "Scene":
        """Each row moved to the right by a number [B] of columns, as longer prompts would; `room` more columns."""

        def move(x: Tensor) -> Tensor:
            if x.dim() == 1:
                return x
            out = x.new_zeros(len(x), x.shape[1] + room)
            index = torch.arange(x.shape[1]) + by[:, None]
            return out.scatter(1, index, x)

        return self.each(move)

    def junk(self) -> "Scene":
        """Other numbers wherever nothing was sampled."""
        mask, generator = self.batch.mask, torch.Generator().manual_seed(5)
        return self.each(
            lambda x: (
                torch.where(mask, x, 3.0 + torch.rand(x.shape, generator=generator))
                if x.shape == mask.shape and x.is_floating_point()
                else x
            )
        )

    def having(self, **changed: Tensor) -> "Scene":
        """With other columns of the batch."""
        more: dict[str, Any] = dict(changed)
        return replace(self, batch=replace(self.batch, **more))

    def nudged(self, by: Tensor) -> "Scene":
        """With other log-probabilities of the current policy, and everything else the same."""
        return replace(self, policy=replace(self.policy, logprobs=self.policy.logprobs + by))

    def on_policy(self) -> "Scene":
        """As at the first optimizer step: the current policy sampled it. Entropies are all 1."""
        now = self.policy.logprobs
        entropy = self.batch.mask.float()
        return replace(
            self.having(old_logprobs=now, rollout_logprobs=now), policy=replace(self.policy, entropy=entropy)
        )

    def drifted(self, nats: float) -> "Scene":
        """The policy so far from the old one, and that as far from the rollout's in every second row."""
        old, mask = needed(self.batch.old_logprobs, "old_logprobs"), self.batch.mask
        odd = torch.arange(len(old))[:, None] % 2 == 1
        # The lower of two moves, because no log-probability is above 0.
        old, now = (torch.where(mask, old - max(nats, 0.0), 0.0), torch.where(mask, old + min(nats, 0.0), 0.0))
        rollout = torch.where(mask & odd, old - abs(nats), self.batch.rollout_logprobs)
        return replace(
            self.having(old_logprobs=old, rollout_logprobs=rollout), policy=replace(self.policy, logprobs=now)
        )


def draw(*, critic: bool, seed: int) -> Scene:
    """Eleven rows in groups of 3, 3, 2 and 3 that are not neighbours, of 1 to 9 sampled tokens, some with gaps."""
    mask = torch.zeros(len(ROWS), WIDTH, dtype=torch.bool)
    for row, (_, start, end, _) in enumerate(ROWS):
        mask[row, start:end] = True
    mask[1, 4:6] = mask[5, 6] = False  # a tool's reply between two turns
    generator = torch.Generator().manual_seed(seed)

    def noise(size: float) -> Tensor:
        return size * torch.randn(mask.shape, generator=generator) * mask

    old = (-1.0 - noise(0.6).abs()) * mask
    ids = torch.randint(1, 99, (len(ROWS), WIDTH + 1), generator=generator)
    batch = Batch(
        input_ids=ids,
        mask=mask,
        rollout_logprobs=old + noise(0.15),
        versions=torch.where(mask, 0, -1),
        rewards=torch.tensor([reward for *_, reward in ROWS]),
        group_ids=torch.tensor([group for group, *_ in ROWS]),
        old_logprobs=old,
        ref_logprobs=old + noise(0.3),
        values=noise(0.5),
    )
    values = noise(0.5) if critic else None
    policy = PolicyOutput(logprobs=old + noise(0.35), entropy=(0.5 + noise(0.5).abs()) * mask, values=values)
    return Scene(batch=batch, policy=policy)
