"""A real learner learns from an episode what it learns from the same episode in several rows."""

from collections.abc import Callable

import pytest

from live import engine_config
from pair import make_learner
from rl.batch import collate
from rl.config import TrainerConfig
from rl.objectives import GSPO, PPO, GiGPO, Objective
from rl.types import Trajectory

PROMPT, ANSWER = [7, 8, 9], [5, 6]


def rows(*, cut: bool) -> list[Trajectory]:
    """Two groups of three episodes of two turns; the second turn in a row of its own, or in that of the first."""
    made: list[Trajectory] = []
    for group in range(2):
        for member in range(3):
            first, second = [20 + 5 * member + group, 30], [40 + member, 50, 60][: 1 + member]
            ids = [*PROMPT, group + 10, *first, *ANSWER, *second]
            n = len(PROMPT) + 1
            turns = [-1] * n + [0, 0] + [-1] * len(ANSWER) + [1] * len(second)
            ends, reward = (n + 1, len(ids) - 1), 0.5 * member + 0.25 * group
            whole = Trajectory(
                group=group,
                episode=member,
                token_ids=ids,
                mask=[t >= 0 for t in turns],
                logprobs=[-4.5 if t >= 0 else 0.0 for t in turns],
                versions=[0 if t >= 0 else -1 for t in turns],
                reward=reward,
                turns=turns,
                paid=((ends[0], 0.25), (ends[1], reward - 0.25)),
            )
            parts = [whole] if not cut else [only(whole, 0, 0), only(whole, 1, 1)]
            made += parts
    return made


def only(whole: Trajectory, row: int, turn: int) -> Trajectory:
    """The row of an episode in which one turn was sampled, with its whole history."""
    assert whole.turns is not None
    mine = [t == turn for t in whole.turns]
    end = max(i for i, m in enumerate(mine) if m) + 1
    return Trajectory(
        group=whole.group,
        episode=whole.episode,
        row=row,
        token_ids=whole.token_ids[:end],
        mask=mine[:end],
        logprobs=[x if m else 0.0 for x, m in zip(whole.logprobs, mine, strict=True)][:end],
        versions=[x if m else -1 for x, m in zip(whole.versions, mine, strict=True)][:end],
        reward=whole.reward,
        turns=[x if m else -1 for x, m in zip(whole.turns, mine, strict=True)][:end],
        paid=tuple(p for p in whole.paid or () if mine[p[0]]),
    )


OBJECTIVES = [GSPO(clip_low=0.01, clip_high=0.02, kl_coef=0.01), PPO(turn_gamma=0.9), GiGPO(average_over="constant")]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_the_rows_of_an_episode_change_no_number_of_a_step(tiny: Callable, objective: Objective) -> None:
    trainer = TrainerConfig(lr=1e-3, minibatches=2, micro_batch_tokens=24)
    config = engine_config(tiny(), objective=objective, trainer=trainer, old_logprobs="recompute")
    found = []
    for cut in (False, True):
        batch = collate(rows(cut=cut))
        assert (batch.episode_ids is not None) == cut
        learner = make_learner(config)
        found.append([learner.step(batch) for _ in range(3)])
    for one, other in zip(*found, strict=True):
        assert one["actor/grad_norm"] > 0.01
        assert set(one) == set(other)
        for name in sorted(one):
            if name.startswith(("actor/", "critic/", "rollout_corr/")):
                assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
