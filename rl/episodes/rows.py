"""Which trajectories are one episode, in which state did each turn begin, and what was each token paid?"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from itertools import groupby

from rl.types import Trajectory


def first_rows(trajectories: list[Trajectory]) -> list[Trajectory]:
    """One trajectory for each episode, which has its reward, its parts and its end: its first row."""
    return [t for t in trajectories if t.row == 0]


def by_episode(trajectories: list[Trajectory]) -> list[list[int]]:
    """Indices of the trajectories of each episode in the order of its rows; episodes in the order of their first."""
    if not any(t.row for t in trajectories):
        return [[i] for i in range(len(trajectories))]
    found: dict[tuple[int, int], list[int]] = {}
    for i, t in enumerate(trajectories):
        found.setdefault((t.group, t.episode), []).append(i)
    for (group, episode), of in found.items():
        of.sort(key=lambda i: trajectories[i].row)
        rows = [trajectories[i].row for i in of]
        assert rows == [*range(len(of))], (
            f"group {group}, episode {episode} has the rows {rows}, not each from 0 on once"
        )
        turned = len(of) == 1 or all(trajectories[i].turns is not None for i in of)
        assert turned, f"group {group}, episode {episode}: rows without their turns have no order of time"
    return [*found.values()]


def turns_of(t: Trajectory) -> Sequence[int]:
    """The turn of every token; -1 outside the mask."""
    return [0 if sampled else -1 for sampled in t.mask] if t.turns is None else t.turns


def states_of(rows: list[Trajectory]) -> list[list[int]]:
    """The state in which each token's turn began, for the rows of one episode; -1 outside the mask.

    A state is a digest of what the policy was given since it last sampled: the tokens before the turn, without the
    longest beginning that was the whole history after an earlier turn. A history that was edited is a new state. So no
    cut of an episode into rows changes a state.
    """
    spans: list[tuple[int, int, int, int]] = []
    for row, t in enumerate(rows):
        end = 0
        for turn, tokens in groupby(turns_of(t)):
            start, end = end, end + len([*tokens])
            if turn >= 0:
                spans.append((turn, row, start, end))
    ids = [array("q", t.token_ids) for t in rows]
    size = array("q").itemsize
    histories: list[bytes] = []
    states = [[-1] * len(t.token_ids) for t in rows]
    for _, row, start, end in sorted(spans):
        given = ids[row][:start].tobytes()
        known = next((len(h) for h in sorted(histories, key=len, reverse=True) if given.startswith(h)), 0)
        digest = blake2b(given[known:], digest_size=size).digest()
        states[row][start:end] = [int.from_bytes(digest, "little") >> 1] * (end - start)
        histories.append(ids[row][:end].tobytes())
    return states


def payments(rows: list[Trajectory]) -> list[list[float]]:
    """What every token of an episode is paid: as its rows say, else the whole reward at its last sampled token."""
    amounts = [(row, i, amount) for row, t in enumerate(rows) for i, amount in t.paid or ()]
    if all(t.paid is None for t in rows):
        sampled = [(turn, row, i) for row, t in enumerate(rows) for i, turn in enumerate(turns_of(t)) if turn >= 0]
        amounts = [(row, i, rows[0].reward) for _, row, i in sorted(sampled)[-1:]]
    paid = [[0.0] * len(t.token_ids) for t in rows]
    for row, i, amount in amounts:
        assert rows[row].mask[i], f"group {rows[row].group}: token {i} is paid, and was not sampled"
        paid[row][i] += amount
    reward, total = rows[0].reward, sum(amount for *_, amount in amounts)
    whole = all(t.trained for t in rows) and any(any(t.mask) for t in rows)
    assert not whole or abs(total - reward) <= 1e-4 * max(1.0, abs(reward)), f"{total} was paid of a reward of {reward}"
    return paid
