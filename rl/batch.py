"""How do trajectories become the tensors of one step, and how is a step cut into micro-batches and ranks?"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rl.episodes.rows import by_episode, payments, states_of, turns_of
from rl.types import Batch, Completion, Prompt, Trajectory

Numbers = Sequence[int | float]
"""A column of one row."""


def trajectory(
    prompt: Prompt, completion: Completion, reward: float, parts: dict[str, float], *, mask_truncated: bool = False
) -> Trajectory:
    """Join a prompt and one completion of it, token in, token out. With `mask_truncated` it is not trained on if it was
    cut off."""
    p, n = len(prompt.token_ids), len(completion.token_ids)
    return Trajectory(
        group=prompt.ordinal,
        token_ids=array("i", prompt.token_ids) + array("i", completion.token_ids),
        mask=array("b", bytes(p) + b"\1" * n),
        logprobs=array("f", [0.0]) * p + array("f", completion.logprobs),
        versions=array("i", [-1]) * p + array("i", completion.versions),
        reward=reward,
        reward_parts=parts,
        finish_reason=completion.finish_reason,
        support=None if completion.support is None else [list[int]() for _ in range(p)] + completion.support,
        experts=completion.experts,
        trained=not (mask_truncated and completion.finish_reason == "length"),
        engine=completion.engine,
    )


def without_tokens(t: Trajectory) -> Trajectory:
    """The same reply with nothing to train on: its mask is empty, and outside the mask there are no numbers."""
    n = len(t.token_ids)
    support = None if t.support is None else [list[int]() for _ in range(n)]
    paid = None if t.paid is None else tuple[tuple[int, float]]()
    bare = replace(t, mask=[0] * n, logprobs=[0.0] * n, versions=[-1] * n, support=support, paid=paid)
    return replace(bare, turns=None if t.turns is None else [-1] * n)


def collate(trajectories: list[Trajectory]) -> Batch:
    """Right-pad trajectories to [B, T + 1] and shift them: column t predicts token t + 1. Nothing else shifts.

    A trajectory that is not trained on keeps its row, with an empty mask: baselines see its reward. The columns of
    episodes are None where they say nothing: one row each, one turn each, all of the reward at the end.
    """
    trajectories = [t if t.trained else without_tokens(t) for t in trajectories]
    length = max(len(t.token_ids) for t in trajectories)
    support = _support(trajectories, length)
    return Batch(
        input_ids=_pad([t.token_ids for t in trajectories], length, 0, torch.long),
        mask=_pad([t.mask for t in trajectories], length, False, torch.bool, first=1),
        rollout_logprobs=_pad([t.logprobs for t in trajectories], length, 0.0, torch.float32, first=1),
        versions=_pad([t.versions for t in trajectories], length, -1, torch.long, first=1),
        rewards=torch.tensor([t.reward for t in trajectories], dtype=torch.float32),
        group_ids=torch.tensor([t.group for t in trajectories], dtype=torch.long),
        support=None if support is None else support[:, 1:],
        experts=_experts(trajectories, length),
        **_of_episodes(trajectories, length),
    )


def _of_episodes(trajectories: list[Trajectory], length: int) -> dict[str, Tensor]:
    """`episode_ids`, `turns`, `states` and `token_rewards`, as far as they say something."""
    episodes = by_episode(trajectories)
    several_rows = len(episodes) < len(trajectories)
    found: dict[str, Tensor] = {}

    def column(of: Callable[[list[Trajectory]], Sequence[Numbers]], fill: int | float, dtype: torch.dtype) -> Tensor:
        rows: list[Numbers] = [() for _ in trajectories]
        for own in episodes:
            for i, row in zip(own, of([trajectories[i] for i in own]), strict=True):
                rows[i] = row
        return _pad(rows, length, fill, dtype, first=1)

    if several_rows:
        ids = {i: episode for episode, of in enumerate(episodes) for i in of}
        found["episode_ids"] = torch.tensor([ids[i] for i in range(len(trajectories))])
    if any(turn > 0 for t in trajectories for turn in t.turns or ()):
        found["turns"] = column(lambda rows: [turns_of(t) for t in rows], -1, torch.long)
        found["states"] = column(states_of, -1, torch.long)
    if several_rows or any(t.paid is not None for t in trajectories):
        found["token_rewards"] = column(payments, 0.0, torch.float32)
    return found


ITEM = {torch.long: "q", torch.float32: "f", torch.bool: "b"}
"""Python's name of a tensor's item: `array` reads a list several times faster than torch does."""
DTYPE = {"i": torch.int32, "q": torch.long, "f": torch.float32, "b": torch.int8}
"""A tensor's name of an array's item."""


def _pad(rows: Sequence[Numbers], length: int, value: int | float, dtype: torch.dtype, first: int = 0) -> Tensor:
    """Rows as [B, length - first], right-padded with `value`, each without its first `first` numbers. Not a slice of a
    wider tensor: that would have to be copied before it can travel."""
    padded = torch.full((len(rows), length - first), value, dtype=dtype)
    for row, to in zip(rows, padded, strict=True):
        if row:
            numbers: array[Any] = row if isinstance(row, array) else array(ITEM[dtype], row)
            to[: len(row) - first] = torch.frombuffer(numbers, dtype=DTYPE[numbers.typecode])[first:]
    return padded


def _support(trajectories: list[Trajectory], length: int) -> Tensor | None:
    """The kept ids of every token [B, length, K], padded with -1; int32, because K may be hundreds."""
    known = [t.support for t in trajectories if t.support is not None]
    if not known:
        return None
    assert len(known) == len(trajectories), "some trajectories have the ids that truncation kept, and some do not"
    counts = torch.tensor([[*map(len, kept), *[0] * (length - len(kept))] for kept in known])
    for t, kept in zip(trajectories, known, strict=True):
        assert [bool(ids) for ids in kept] == [*t.mask], (
            f"group {t.group}: kept ids belong to sampled tokens, and to each"
        )
    filled = torch.arange(int(counts.max())) < counts[..., None]
    ids = torch.tensor(list(chain.from_iterable(chain.from_iterable(known))), dtype=torch.int32)
    return torch.full(filled.shape, -1, dtype=torch.int32).masked_scatter_(filled, ids)


def _experts(trajectories: list[Trajectory], length: int) -> Tensor | None:
    """The experts of every token but the last [B, length - 1, layers, k], -1 behind a row; int16, because a long row of
    a large model has millions."""
    known = [t.experts for t in trajectories if t.experts is not None]
    if not known:
        return None
    assert len(known) == len(trajectories), "some trajectories have the experts of their tokens, and some do not"
    experts = torch.full((len(known), length - 1, *known[0].shape[1:]), -1, dtype=torch.int16)
    for row, t, own in zip(experts, trajectories, known, strict=True):
        assert len(own) == len(t.token_ids) - 1, f"group {t.group}: experts of {len(own)} of {len(t.token_ids)} tokens"
        row[: len(own)] = own
    return experts


def integers(x: Tensor) -> list[int]:
    """A tensor [N] of integers as a list: torch does not state the type of `tolist`."""
    return x.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def lengths(mask: Tensor) -> Tensor:
    """Columns [R] that each row of a mask [R, T] needs: up to its last sampled token, because causal attention never
    looks ahead."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * columns).amax(dim=1)


def trained_rows(batch: Batch) -> Tensor:
    """Indices [R] of the rows with a sampled token; the others have nothing to compute."""
    return batch.mask.any(dim=1).nonzero()[:, 0]


def episodes(batch: Batch, rows: Tensor) -> list[Tensor]:
    """The given rows [R] by episode, in the order in which these first appear. Minibatches are cut between them."""
    if batch.episode_ids is None:
        return [*rows[:, None]]
    found: dict[int, list[int]] = {}
    for row, episode in zip(integers(rows), integers(batch.episode_ids[rows]), strict=True):
        found.setdefault(episode, []).append(row)
    return [torch.tensor(of) for of in found.values()]


def take(batch: Batch, rows: Tensor) -> Batch:
    """The given rows [R] of a batch, cut to the columns that they need.

    No rows give one row whose mask is empty: a forward and backward pass of it runs every layer and adds nothing.
    """
    chosen = rows if len(rows) else torch.zeros(1, dtype=torch.long)
    width = max(1, int(lengths(batch.mask[chosen]).max()))  # an empty reply needs no column, and a model needs one
    picked: dict[str, Any] = {}
    for f in fields(batch):
        value = getattr(batch, f.name)
        if value is not None:
            value = value[chosen]
            if value.dim() > 1:
                value = value[:, : width + (f.name == "input_ids")]
        picked[f.name] = value
    if not len(rows):
        picked["mask"] = torch.zeros_like(picked["mask"])
    return replace(batch, **picked)


Unit = tuple[int, int]
"""A group or an episode, and which part of it."""


def micro_batches(
    batch: Batch,
    rows: Tensor,
    *,
    ranks: int,
    budget: int,
    share_prompts: bool,
    packed: bool = True,
    features: int | None = None,
) -> list[list[Tensor]]:
    """Cut rows into micro-batches of about `budget` tokens, the same number of them on every rank.

    The rows of an episode stay together, because a ratio may be that of the whole episode. With `share_prompts` those
    of a group do, as far as the budget allows, and what two of them begin with, up to the first sampled token, counts
    once. Rows that are not `packed` count as long as the longest row of their micro-batch. Units (episodes, or groups
    and parts of groups) are dealt largest first to the rank with the least work. A token costs 1; with `features`, the
    model's hidden size, it costs position / (6 features) more for its attention (4 features x position FLOPs, against
    about 24 features^2 in the linear layers of a block). Returns one list of row indices [R] per rank. A rank with less
    work gets empty ones: ZeRO 2 and 3 communicate inside backward, and unequal counts would hang. An episode above the
    budget is a micro-batch of its own.
    """
    total = lengths(batch.mask)
    members = [integers(episode) for episode in episodes(batch, rows)]
    units, shared = _units(batch, members, total, budget if share_prompts else None)
    cost = {u: int((total - shared)[of].sum()) for u, of in units.items()}

    def size(together: list[Unit]) -> int:
        of = [row for u in together for row in units[u]]
        return sum(cost[u] for u in together) if packed else len(of) * int(total[of].max())

    def work(unit: Unit) -> float:
        of = units[unit]
        squares = total[of] ** 2 - shared[of] ** 2
        return cost[unit] + (0.0 if features is None else float(squares.sum()) / (12 * features))

    shares: list[list[Unit]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for unit in sorted(units, key=lambda u: (-work(u), u)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        shares[rank].append(unit)
        load[rank] += work(unit)
    cut = [
        [torch.tensor([row for u in m for row in units[u]]) for m in _fill(share[::-1], size, budget)]
        for share in shares
    ]
    most = max(len(c) for c in cut)
    return [c + [torch.empty(0, dtype=torch.long)] * (most - len(c)) for c in cut]


def _units(
    batch: Batch, members: list[list[int]], total: Tensor, budget: int | None
) -> tuple[dict[Unit, list[int]], Tensor]:
    """Rows that stay together, by a name, and the columns [B] of each row that a row before it in its unit computes:
    what both begin with, up to the first sampled token, if that is the same.

    `members` are the rows of each episode. Without a budget each episode is a unit, and nothing is shared. With one it
    is the group, which ends and goes on in another unit where an episode would exceed the budget.
    """
    prompt = integers(batch.mask.int().argmax(dim=1) + 1)
    shared, units = torch.zeros_like(total), dict[Unit, list[int]]()
    names = batch.group_ids if budget is not None else batch.episode_ids
    part, size, seen = dict[int, int](), dict[int, int](), dict[int, set[bytes]]()
    for rows in members:
        name = rows[0] if names is None else int(names[rows[0]])
        if budget is None:
            units[name, 0] = rows
            continue
        begins = [batch.input_ids[row, : prompt[row]].numpy().tobytes() for row in rows]
        whole, prompts = int(total[rows].sum()), [prompt[row] for row in rows]
        saved = _saved(begins, prompts, seen.get(name, set()))
        if name not in part or size[name] + whole - sum(saved) > budget:
            part[name], size[name], seen[name] = part.get(name, -1) + 1, 0, set()
            saved = _saved(begins, prompts, set())
        shared[rows] = torch.tensor(saved)
        size[name] += whole - sum(saved)
        seen[name].update(begins)
        units.setdefault((name, part[name]), []).extend(rows)
    return units, shared


def _saved(begins: list[bytes], prompts: list[int], seen: set[bytes]) -> list[int]:
    """The columns of each row that one before it computes, or one of those whose beginnings were seen."""
    return [n if b in seen or b in begins[:i] else 0 for i, (b, n) in enumerate(zip(begins, prompts, strict=True))]


def _fill(units: list[Unit], size: Callable[[list[Unit]], int], budget: int) -> list[list[Unit]]:
    out: list[list[Unit]] = []
    for unit in units:
        if not out or size([*out[-1], unit]) > budget:
            out.append([])
        out[-1].append(unit)
    return out
