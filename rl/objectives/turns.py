"""How is a turn of an episode compared with other turns that began in the same state?"""

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rl.objectives.advantages import group_relative, token_rewards
from rl.objectives.grpo import GRPO
from rl.types import Batch


@dataclass(frozen=True, kw_only=True)
class GiGPO(GRPO):
    """Group-in-group policy optimisation (arXiv 2505.10978, section 4): credit for an episode, and for each turn.

    A = A_episode + turn_weight A_turn. A_episode is GRPO's. A_turn is a turn's reward to come, discounted by turn,
    relative to all turns of the group that began in the same state (`Batch.states`): 0 where no other turn did. It
    needs rewards by turn, or episodes of different lengths, to tell turns apart. The loss is GRPO's.
    """

    turn_gamma: float = 0.95
    """Discount per turn of the rewards to come, from 0 to 1."""
    turn_weight: float = 1.0
    """Weight of the turn's advantage; 0 is GRPO."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.turn_gamma <= 1.0 or self.turn_weight < 0.0:
            raise ValueError(
                f"turn_gamma={self.turn_gamma:g} must be from 0 to 1, and turn_weight={self.turn_weight:g} at least 0"
            )

    def advantages(self, batch: Batch) -> Float[Tensor, "B T"]:
        per_turn = turn_relative(batch, gamma=self.turn_gamma, divide_by_std=self.divide_by_std)
        return super().advantages(batch) + self.turn_weight * per_turn


def turn_relative(batch: Batch, *, gamma: float, divide_by_std: bool) -> Float[Tensor, "B T"]:
    """The reward to come of each token's turn, relative to the turns of its group that began in the same state.

    Equal rewards to come give exactly 0. Without `turns`, every row is one turn that began in its group's prompt.
    """
    turns = torch.where(batch.mask, 0, -1) if batch.turns is None else batch.turns
    to_come, there = turn_returns(token_rewards(batch), turns, batch.mask, gamma=gamma)
    states = torch.zeros_like(turns) if batch.states is None else batch.states
    turn = turns.clamp(min=0)
    began = torch.zeros(there.shape, dtype=states.dtype).scatter_reduce(1, turn, states * batch.mask, "amax")
    place = torch.stack([batch.group_ids[:, None].expand(there.shape), began], dim=-1)[there]
    unique = torch.unique(place, dim=0, return_inverse=True)  # pyright: ignore
    anchors = cast("tuple[Tensor, Tensor]", unique)[1]
    relative = torch.zeros_like(to_come)
    relative[there] = group_relative(to_come[there], anchors, divide_by_std=divide_by_std)
    return relative.gather(1, turn) * batch.mask


def turn_returns(
    rewards: Float[Tensor, "B T"], turns: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, gamma: float
) -> tuple[Float[Tensor, "B K"], Bool[Tensor, "B K"]]:
    """Rewards to come of each turn: its own tokens' rewards plus gamma times those to come of the next; and which turns
    a row has."""
    turn, rows, most = turns.clamp(min=0), len(turns), max(1, int(turns.max()) + 1)
    paid = torch.zeros(rows, most, dtype=torch.double).scatter_add(1, turn, torch.where(mask, rewards, 0.0).double())
    there = torch.zeros(rows, most, dtype=torch.long).scatter_add(1, turn, mask.long()) > 0
    to_come, following = torch.zeros_like(paid), torch.zeros_like(paid[:, 0])
    for k in reversed(range(most)):
        following = torch.where(there[:, k], paid[:, k] + gamma * following, following)
        to_come[:, k] = following
    # Rounded to the rewards' own precision: `group_relative` finds equal numbers of it exactly equal.
    return to_come.to(rewards.dtype), there
