"""What holds a run back, and which setting would change it? Read from its metrics alone."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from rl.parity.trends import Change, Estimate, Series, above, change, turned

Row = Mapping[str, float | None]
ENGINE = re.compile(r"perf/engine_(\d+)/tokens_per_s")
PART = re.compile(r"reward/(.+)/mean")
WAITS, WAITS_IN_TURN = 0.5, 0.7
"""Share of a step that one side may wait for the other: while they overlap, and where they take turns."""
SLOW = 0.6
"""Speed of an engine, as a share of that of the others, below which it holds up the rest."""
CUT, DROPPED, ALIKE = 0.1, 0.05, 0.8
"""Shares of replies that are cut off, of groups that become too old, and of groups with equal rewards."""
COLLAPSED, DRIFTED = 0.2, 1.5
"""Entropy as a share of its first value, and length as a multiple of it (or one part in this multiple)."""
STALLED, PATIENCE_S = 12.0, 60.0
"""Median steps, and seconds, without a new step."""


@dataclass(frozen=True)
class Advice:
    """One cause, the figure that shows it, and the setting that would change it."""

    cause: str
    metric: str
    """It is shown next to this figure."""
    figure: Estimate
    """Its value, its standard error, and the first step that it holds for."""
    what: str
    """The fact in words, without its figure."""
    setting: str
    """What to change."""
    form: str = ".0%"

    @property
    def text(self) -> str:
        """All of it in two sentences."""
        value, error = (format(number, self.form) for number in (self.figure.value, self.figure.error))
        fact = f"{self.what} ({value} ± {error.lstrip('+')}, {self.metric})"
        return f"{self.cause} since step {self.figure.since}: {fact}. {self.setting}"


class History:
    """The steps of a run, from the rows of metrics.jsonl."""

    def __init__(self, rows: Sequence[Row], settings: Mapping[str, Any]) -> None:
        self.rows = [row for row in rows if row.get("reward/mean") is not None]
        self.takes_turns = not settings.get("max_staleness")
        self.reward = self.of("reward/mean")

    def of(self, name: str) -> Series:
        """A figure by step."""
        values = [(int(row["step"] or 0), row.get(name)) for row in self.rows]
        return [(step, value) for step, value in values if value is not None and math.isfinite(value)]

    def like(self, pattern: re.Pattern[str]) -> dict[str, Series]:
        """All figures of one kind, by what the pattern captures."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        found = {match[1]: self.of(name) for name in names if (match := pattern.fullmatch(name))}
        return {key: series for key, series in found.items() if series}

    @property
    def place(self) -> float:
        """Where the last rewards are, from 0 (the lowest that is known) to 1 (the highest). What a reward can be is not
        known: 0, 1, and what steps had on average are."""
        values = sorted(value for _, value in self.reward)
        odd = len(values) // 20
        low, high = min(0.0, values[odd]), max(1.0, values[-1 - odd])
        return (fmean(value for _, value in self.reward[-10:]) - low) / (high - low)

    def rose(self, since: int = 0) -> Change | None:
        """How the reward changed, where it did not rise; None where it rose, or too little is known. `since` leaves out
        what came long before that step."""
        before = [point for point in self.reward if point[0] < since]
        found = change([*before[-len(self.reward) // 4 :], *self.reward[len(before) :]] if since else self.reward)
        return found if found and not (found.value > 0 and found.sure(2.5)) else None


def advise(rows: Sequence[Row], settings: Mapping[str, Any], idle_s: float = 0.0) -> list[Advice]:
    """What is sure by three standard errors. `rows` are those of metrics.jsonl, `settings` the config of the run,
    `idle_s` the seconds since the last row while the run lives."""
    history = History(rows, settings)
    if len(history.rows) < 2:
        return []
    rules = (_stalled(history, idle_s), _waits(history), _slow(history), _lost(history), _alike(history))
    found = [advice for rule in rules for advice in rule]
    if not any(advice.cause == "solved data" for advice in found):
        found += [*_collapse(history), *_drift(history), *_one_part(history)]
    return found


def _stalled(history: History, idle_s: float) -> Iterator[Advice]:
    seconds = [value for _, value in history.of("timing_s/step")]
    if not seconds or idle_s < max(STALLED * median(seconds), 2 * max(seconds), PATIENCE_S):
        return
    found = Estimate(value=idle_s, error=0.0, since=history.reward[-1][0])
    what = f"no step has ended for {idle_s / median(seconds):.0f} times the median step"
    setting = (
        "An evaluation or a checkpoint may be under way. Else look at the actors' logs; `deadlines` ends the wait."
    )
    yield Advice("stalled", "timing_s/step", found, what, setting, ".0f")


def _waits(history: History) -> Iterator[Advice]:
    bound = WAITS_IN_TURN if history.takes_turns else WAITS
    more = "Set `max_staleness` to 1, so that both work at once, or raise" if history.takes_turns else "Raise"
    if found := above(history.of(name := "perf/trainer_idle_frac"), bound):
        scoring, sampling = (sum(v for _, v in history.of(f"queue/{state}")) for state in ("scoring", "sampling"))
        cause, what, setting = "engine-bound", "samples", f"{more} `rollout.engines` or `rollout.max_num_seqs`."
        if scoring > sampling:
            cause, what, setting = "reward-bound", "rewards", "Make the reward faster."
        yield Advice(cause, name, found, f"the learner waits for {what} in this share of a step", setting)
    if found := above(history.of(name := "perf/rollout_idle_frac"), bound):
        what = "the engines wait for the learner in this share of a step"
        yield Advice("learner-bound", name, found, what, f"{more} `trainer.ranks`.")


def _slow(history: History) -> Iterator[Advice]:
    rates = {engine: dict(series) for engine, series in history.like(ENGINE).items()}
    for engine, rate in rates.items():
        others = {s: [each[s] for name, each in rates.items() if name != engine and each.get(s)] for s in rate}
        if found := above([(s, 1 - rate[s] / median(each)) for s, each in others.items() if each], 1 - SLOW):
            name = f"perf/engine_{engine}/tokens_per_s"
            what = f"engine {engine} is slower than the others by this share"
            yield Advice("one slow engine", name, found, what, "Look at what else runs on its device or node.")


def _lost(history: History) -> Iterator[Advice]:
    if found := above(history.of(name := "response_length/truncated_frac"), CUT):
        what = ("most replies are" if found.value > 0.5 else "this share of the replies is") + " cut off"
        yield Advice("long replies lost", name, found, what, "Raise `rollout.max_tokens`, or set `mask_truncated`.")
    old, trained = (dict(history.of(f"ledger/{state}")) for state in ("filtered(too_old)", "trained"))
    rates = [
        (b, lost / (lost + learned))
        for a, b in pairwise(step for step in trained if step in old)
        if (lost := old[b] - old[a]) + (learned := trained[b] - trained[a]) > 0
    ]
    if found := above(rates, DROPPED):
        what = "this share of the groups of a step becomes too old, the long ones first"
        setting = "Raise `max_staleness`, or set `late_groups=wait`."
        yield Advice("long replies lost", "staleness/dropped_frac", found, what, setting)


def _alike(history: History) -> Iterator[Advice]:
    for name in ("reward/frac_zero_std", "filter/taken_frac"):
        if not (found := above(history.of(name), ALIKE)):
            continue
        cause, setting = "solved and hopeless data", "Leave out what is solved or hopeless (`filters`)"
        if history.place > 0.9:
            cause, setting = "solved data", "Take harder data, or end the run"
        elif history.place < 0.1:
            cause, setting = "hopeless data", "Take easier data"
        what = "in this share of the groups all rewards are equal, and nothing can be learned"
        yield Advice(cause, name, found, what, f"{setting}, or raise `group_size` or `temperature`.")
        return


def _collapse(history: History) -> Iterator[Advice]:
    found = change(series := history.of(name := "actor/entropy"))
    if found and found.first.value > 0 and found.last.value < COLLAPSED * found.first.value and found.sure():
        last = replace(found.last, since=turned(series, found))
        if reward := history.rose(last.since):
            what = f"it was {found.first.value:.2g} nats at first, and the reward changed by {_signed(reward)} since"
            setting = "Raise `objective.entropy_coef` or `objective.clip_high`, or lower `trainer.lr`."
            yield Advice("entropy collapse", name, last, what, setting, ".2g")


def _drift(history: History) -> Iterator[Advice]:
    found = change(series := history.of(name := "response_length/mean"))
    if not found or not found.sure() or min(found.first.value, found.last.value) <= 0:
        return
    ratio = found.last.value / found.first.value
    if (ratio > DRIFTED or ratio < 1 / DRIFTED) and (reward := history.rose()):
        what = f"replies had {found.first.value:.0f} tokens at first, and the reward changed by {_signed(reward)}"
        setting = "Look at the longest and the shortest replies; give the reward a part for length (`Weighted`)."
        yield Advice("length drift", name, replace(found.last, since=turned(series, found)), what, setting, ".0f")


def _one_part(history: History) -> Iterator[Advice]:
    parts = {name: series for name, series in history.like(PART).items() if len({v for _, v in series}) > 1}
    changes = {name: found for name, series in parts.items() if (found := change(series))}
    rising = [name for name, found in changes.items() if found.value > 0 and found.sure()]
    flat = [n for n, c in changes.items() if not (c.value > 0 and c.sure(2.0)) and not 0.95 <= c.last.value <= 1.0]
    if len(rising) == 1 and flat and len(flat) + 1 == len(changes):
        (name,) = rising
        rose = Estimate(value=changes[name].value, error=changes[name].error, since=turned(parts[name], changes[name]))
        what = f"{name} rose, and " + "; ".join(f"{n} changed by {_signed(changes[n])}" for n in flat)
        setting = "Change the weights of the parts, or pay for this part only where the others are paid."
        yield Advice("only one part of the reward carries", f"reward/{name}/mean", rose, what, setting, "+.2g")


def _signed(found: Change) -> str:
    return f"{found.value:+.2g} ± {found.error:.2g}"
