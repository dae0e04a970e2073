"""What is a row of the rollout record? One row of tokens, what became of it, and what the learner saw at each token."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rl.episodes.rows import turns_of
from rl.episodes.seen import NUMBERS, Seen, Why
from rl.types import Trajectory

TEXTS = ("state", "reason", "finish", "parts", "paid", "verdicts", "error")
WHOLE = ("step", "group", "episode", "row", "tokens", "prompt_tokens", "turns", "engine", "version_min", "version_max")
WHOLE = (*WHOLE, "passed", "silent")
REAL = ("reward", "advantage", "gap_mean", "gap_max", "clip_frac", "weight", "entropy", "began", "ended")
SCALARS = (*TEXTS, *WHOLE, *REAL, "old_is_rollout")
BITS = {"rollout": 7, "gap": 7, "moved": 7, "entropy_at": 4, "weight_at": 8, "advantage_at": 8}
"""Numbers of each token, in float32, and how many bits of their mantissas are kept. Rounding changes a number by at
most 2^-(bits + 1) of itself: by 0.4%, which is three digits, and by 3% of an entropy, which is two. With 7 bits a
number is in two bytes, one of which compresses to a third. Means and maxima of a row are those of the exact numbers."""
COUNTS = {"ids": np.int32, "flags": np.int16, "version": np.int32, "turn": np.int16}
LISTS = (*COUNTS, *BITS)
SCHEMA = pa.schema(
    [(name, pa.string()) for name in TEXTS]
    + [(name, pa.int64()) for name in WHOLE]
    + [(name, pa.float64()) for name in REAL]
    + [("old_is_rollout", pa.bool_())]
    + [(name, pa.list_(pa.from_numpy_dtype(kind))) for name, kind in COUNTS.items()]
    + [(name, pa.list_(pa.float32())) for name in BITS],
    metadata={"schema": "unison-rollouts/1"},
)
CLIPPED = Why.CLIPPED_LOW | Why.CLIPPED_HIGH


@dataclass(frozen=True, kw_only=True)
class Told:
    """One row of tokens, and what became of its group."""

    trajectory: Trajectory
    end: str = "trained"
    """The ledger's: `trained`, `filtered(reason)` or `failed(reason)`."""
    error: str = ""
    began: float = math.nan
    ended: float = math.nan
    """When its group was first sampled, and when it was scored: seconds since 1970."""


def untold(ordinal: int, prompt: list[int]) -> Trajectory:
    """The row of a group without samples."""
    n = len(prompt)
    return Trajectory(
        group=ordinal,
        token_ids=prompt,
        mask=[False] * n,
        logprobs=[0.0] * n,
        versions=[-1] * n,
        reward=math.nan,
        finish_reason="abort",
        trained=False,
    )


def worst_gaps(rows: Sequence[Trajectory], seen: list[Seen]) -> list[float]:
    """The largest |trainer - engine| of each row of a batch in nats; NaN where the learner computed no token of it."""
    places = _places(seen)
    return [_worst(t, places[i]) if t.trained and i in places else math.nan for i, t in enumerate(rows)]


def _worst(t: Trajectory, place: tuple[Seen, int]) -> float:
    numbers, _ = _seen(place, len(t.token_ids), ("old", "now"))
    passed = np.array(t.mask, bool) & np.isfinite(numbers["now"])
    return _largest(_gap(numbers, place[0], np.array(t.logprobs, np.float32))[passed])


def table_of(step: int, told: list[Told], seen: list[Seen]) -> pa.Table:
    """The rows of a step: those of its batch in their order, then those that are not trained on. `seen` is each
    rank's, and empty where the learner saw nothing."""
    places = _places(seen)
    rows = [_row(step, one, places.get(i)) for i, one in enumerate(told)]
    starts = pa.array(np.cumsum([0, *(len(row["ids"]) for row in rows)]), pa.int32())
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in SCALARS}
    for name in LISTS:
        flat = np.concatenate([row[name] for row in rows]) if rows else np.empty(0)
        flat = shortened(flat, BITS[name]) if name in BITS else flat.astype(COUNTS[name])
        columns[name] = pa.ListArray.from_arrays(starts, flat)
    return pa.Table.from_pydict(columns, schema=SCHEMA)


def _row(step: int, told: Told, place: tuple[Seen, int] | None) -> dict[str, Any]:
    t, n = told.trajectory, len(told.trajectory.token_ids)
    mask = np.array(t.mask, bool)
    state, _, reason = told.end.partition("(")
    if state != "trained":
        place = None
    numbers, seen_flags = _seen(place, n)
    rollout = np.array(t.logprobs, np.float32)
    flags = np.where(np.arange(n) < (mask.argmax() if mask.any() else n), Why.PROMPT, Why.READ).astype(np.int16)
    flags[mask] = seen_flags[mask]
    if state != "trained":
        flags[mask] |= Why.LEFT_OUT
    elif not t.trained:
        flags[mask] |= Why.MASKED
    elif place is None:
        flags[mask] |= Why.ZERO_ADVANTAGE
    gap = _gap(numbers, place[0] if place else None, rollout)
    moved = numbers["now"] - numbers["old"]
    passed = mask & np.isfinite(numbers["now"]) if place else np.zeros(n, bool)
    versions = np.array(t.versions, np.int32)
    turns = np.array(turns_of(t), np.int16)
    lists = {"rollout": rollout, "gap": gap, "moved": moved, "entropy_at": numbers["entropy"]}
    lists |= {"weight_at": numbers["weight"], "advantage_at": numbers["advantage"]}
    return {
        "step": step,
        **{name: getattr(t, name) for name in ("group", "episode", "row", "reward", "engine")},
        **{name: getattr(told, name) for name in ("error", "began", "ended")},
        "state": state,
        "reason": reason.removesuffix(")"),
        "parts": _json(dict(t.reward_parts)),
        "paid": _json(t.paid) if t.paid else "",
        "verdicts": _json([[v.judge, v.score, v.raw] for v in t.verdicts]) if t.verdicts else "",
        "finish": t.finish_reason,
        "tokens": int(mask.sum()),
        "prompt_tokens": int((flags & Why.PROMPT > 0).sum()),
        "turns": len({*turns[mask].tolist()}),
        "version_min": int(versions[mask].min()) if mask.any() else -1,
        "version_max": int(versions[mask].max()) if mask.any() else -1,
        "passed": int(passed.sum()),
        "silent": int((flags[mask] != 0).sum()),
        **{name: _mean(numbers[name][passed]) for name in ("advantage", "weight", "entropy")},
        "gap_mean": _mean(np.abs(gap[passed])),
        "gap_max": _largest(gap[passed]),
        "clip_frac": _mean((flags[passed] & CLIPPED) > 0),
        "old_is_rollout": bool(place and place[0].old_is_rollout),
        "ids": np.array(t.token_ids, np.int32),
        "flags": flags,
        "version": versions,
        "turn": turns,
        **{name: np.where(mask, value, np.float32(0)) for name, value in lists.items()},
    }


def _places(seen: list[Seen]) -> dict[int, tuple[Seen, int]]:
    """Where the numbers of each of the batch's rows are."""
    return {row: (of, i) for of in seen for i, row in enumerate(of.rows.tolist())}


def _seen(
    place: tuple[Seen, int] | None, n: int, names: tuple[str, ...] = NUMBERS
) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
    """The learner's numbers and flags [n] of a row's tokens: column t of the batch belongs to token t + 1."""
    numbers = {name: np.full(n, np.nan, np.float32) for name in names}
    flags = np.zeros(n, np.int16)
    if place:
        seen, i = place
        for name in names:
            numbers[name][1:] = seen.numbers[name][i, : n - 1].numpy()
        flags[1:] = seen.flags[i, : n - 1].numpy()
    return numbers, flags


def shortened(x: np.ndarray, bits: int) -> np.ndarray:
    """Float32 numbers rounded to so many bits of mantissa, which compress well; infinities and NaN stay."""
    cut = 23 - bits
    whole = x.astype(np.float32).view(np.uint32)
    near = ((whole + np.uint32(1 << (cut - 1))) >> np.uint32(cut)) << np.uint32(cut)
    return np.where(np.isfinite(x), near.view(np.float32), x.astype(np.float32))


def _gap(numbers: Mapping[str, np.ndarray], seen: Seen | None, rollout: np.ndarray) -> np.ndarray:
    """Trainer - engine [n] in nats: of the same two numbers that the metrics of mismatch compare."""
    return (numbers["now"] if seen and seen.old_is_rollout else numbers["old"]) - rollout


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max()) if x.size else math.nan


def _mean(x: np.ndarray) -> float:
    return float(x.mean(dtype=np.float64)) if x.size else math.nan


def _json(value: Any) -> str:
    """JSON has no NaN and no infinity: they are written as words."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [*map(plain, x)]
        return x if not isinstance(x, float) or math.isfinite(x) else str(x)

    return json.dumps(plain(value), default=str)
