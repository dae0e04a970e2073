"""Does it matter in how many rows an episode travels? Cut into rows, it must be learned from as before."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rl.contract.run import Outcome, run
from rl.contract.scene import Scene
from rl.contract.trial import TOLERANCE, Trial, Violation
from rl.episodes.joined import layout

CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "two rows": lambda turns: (turns > 0).long(),
    "a row for each turn": lambda turns: turns,
    "the rows of two agents that take turns": lambda turns: turns % 2,
}
"""The row of its episode that each turn is sampled in."""


def cut_into_rows(trial: Trial) -> Iterator[Violation]:
    """An episode cut into rows gives the same advantages, the same loss and the same gradient."""
    scene = with_turns(trial.scene)
    episodes = torch.arange(len(scene.batch.rewards))
    at = layout(scene.having(episode_ids=episodes).batch)
    assert at is not None
    # Of whole episodes, whose rows have gaps between their turns, only the place of each number changes.
    whole: Outcome = run(trial.objective, scene).each(at.tokens)
    for name, row_of in CUTS.items():
        wrong = run(trial.objective, rows_of(scene, row_of)).differs(whole, TOLERANCE)
        if wrong:
            yield Violation(
                check="episodes",
                what=f"with each episode cut into {name}, {wrong}",
                remedy="An objective gets one row for each episode: of one that was cut, its sampled tokens alone, in "
                "the order of time. Find a turn by batch.turns and its state by batch.states, never by gaps in "
                "batch.mask or by the tokens in between",
                method="advantages" if "advantages" in wrong else "loss",
            )
            return


def with_turns(scene: Scene) -> Scene:
    """The same rows as episodes of one to five turns, with other tokens in between, and rewards by turn."""
    place = scene.batch.mask.cumsum(dim=1)
    every = 2 + torch.arange(len(place))[:, None] % 2
    mask = scene.batch.mask & (place % every != 0)
    turns = torch.where(mask, (place - 1) // every, -1)
    paid = torch.where(mask, scene.batch.rewards[:, None] + 0.1 * turns, 0.0)
    return scene.having(
        mask=mask,
        versions=torch.where(mask, 0, -1),
        turns=turns,
        states=torch.where(mask, turns % 2, -1),
        token_rewards=paid,
        rewards=paid.sum(dim=1),
    )


def rows_of(scene: Scene, row_of: Callable[[Tensor], Tensor]) -> Scene:
    """Episodes of one row each, cut into rows that hold the whole history, and shuffled."""
    assert scene.batch.turns is not None
    rows = torch.where(scene.batch.mask, row_of(scene.batch.turns), -1)
    episodes, most = len(rows), int(rows.max()) + 1
    order = torch.randperm(episodes * most, generator=torch.Generator().manual_seed(2))
    episode, row = order // most, order % most
    cut = scene.rows(episode)
    here = rows[episode] == row[:, None]
    assert cut.batch.turns is not None
    assert cut.batch.states is not None
    return cut.having(
        mask=here,
        turns=torch.where(here, cut.batch.turns, -1),
        states=torch.where(here, cut.batch.states, -1),
        episode_ids=episode,
    )
