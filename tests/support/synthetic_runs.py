"""Made-up runs: a cause is planted at an odd size, or the run is odd and nothing holds it back."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Made:
    """A made-up run, and what must be said about it."""

    name: str
    cause: str | None
    """None: nothing may be said."""
    rows: list[dict]
    settings: dict = field(default_factory=dict)
    idle_s: float = 0.0
    since: int | None = None
    """The step at which the cause was planted."""


class Noise:
    """Noise of a figure from step to step, part of which the next step keeps."""

    def __init__(self, rng: random.Random, size: float, memory: float):
        self.rng, self.size, self.memory, self.last = rng, size, memory, 0.0

    def __call__(self) -> float:
        self.last = self.memory * self.last + self.rng.gauss(0, self.size) * math.sqrt(1 - self.memory**2)
        return self.last


def bounded(x: float, low: float = 0.0, high: float = 1.0) -> float:
    return min(max(x, low), high)


def run(rng: random.Random, steps: int, staleness: int, **figures: Callable[[float], float]) -> list[dict]:
    """Rows of a healthy run; `figures` replace some by functions of the progress from 0 to 1. In names, __ is /.

    A figure is its function plus noise of a size that is drawn for this run.
    """
    noisy = rng.choice([0.01, 0.03, 0.06])
    memory = rng.choice([0.0, 0.0, 0.3, 0.6])
    seconds = rng.choice([0.7, 4.0, 90.0, 1500.0])
    balance = rng.uniform(0.35, 0.6) if not staleness else rng.uniform(0.0, 0.4)
    entropy, length = rng.choice([0.3, 1.2, 2.5, 4.6]), rng.choice([9, 60, 700, 9000])
    start, gain = rng.uniform(0.05, 0.4), rng.uniform(0.1, 0.5)
    shape: dict[str, Callable[[float], float]] = {
        "reward/mean": lambda t: start + gain * t,
        "reward/frac_zero_std": lambda t: 0.3,
        "actor/entropy": lambda t: entropy * (1 - 0.5 * t),
        "response_length/mean": lambda t: length * (1 + 0.15 * t),
        "response_length/truncated_frac": lambda t: 0.03,
        "perf/trainer_idle_frac": lambda t: balance,
        "perf/rollout_idle_frac": lambda t: 0.9 - balance if not staleness else 0.1,
        "timing_s/step": lambda t: seconds,
        "queue/sampling": lambda t: 0.0 if not staleness else 5.0,
        "queue/scoring": lambda t: 0.0,
    }
    shape |= {name.replace("__", "/"): function for name, function in figures.items()}
    shares = {name for name in shape if "frac" in name}
    noise = {name: Noise(rng, noisy, memory) for name in shape}
    rows = [{"step": 0.0, "eval/held_out/avg@4": start}]
    trained = 0.0
    for step in range(1, steps + 1):
        t = step / steps
        row = {"step": float(step)}
        for name, function in shape.items():
            value = function(t)
            size = 1.0 if name in shares or name.startswith("reward/") else abs(value)
            value = value + size * noise[name]()
            row[name] = bounded(value) if name in shares else max(value, 0.0) if size != 1.0 else value
        trained += 8
        row["ledger/trained"] = trained
        rows.append(row)
    return rows


def after(t0: float, before: float, then: float) -> Callable[[float], float]:
    """A figure that jumps at t0."""
    return lambda t: then if t > t0 else before


def planted(seed: int) -> Made:
    """A run with one cause; which one follows from the seed."""
    rng = random.Random(seed)
    steps = rng.choice([17, 24, 41, 90, 250])
    staleness = rng.choice([0, 1, 3])
    when = rng.choice([0.0, 0.0, 0.2, 0.4])
    kinds = sorted(CAUSES)
    kind = kinds[seed % len(kinds)]
    made = Made(
        name=f"{kind} {seed}", cause=kind, rows=[], settings={"max_staleness": staleness}, since=1 + int(when * steps)
    )
    CAUSES[kind](rng, steps, staleness, when, made)
    return made


def _engine_bound(rng, steps, staleness, when, made):
    share = rng.uniform(0.8, 0.97) if not staleness else rng.uniform(0.6, 0.97)
    made.rows = run(
        rng, steps, staleness, perf__trainer_idle_frac=after(when, 0.3, share), perf__rollout_idle_frac=lambda t: 0.03
    )


def _learner_bound(rng, steps, staleness, when, made):
    share = rng.uniform(0.8, 0.97) if not staleness else rng.uniform(0.6, 0.97)
    made.rows = run(
        rng, steps, staleness, perf__rollout_idle_frac=after(when, 0.3, share), perf__trainer_idle_frac=lambda t: 0.03
    )


def _reward_bound(rng, steps, staleness, when, made):
    made.settings["max_staleness"] = staleness = max(1, staleness)
    made.rows = run(
        rng, steps, staleness, perf__trainer_idle_frac=after(when, 0.3, 0.8), queue__scoring=after(when, 0.0, 40.0)
    )


def _slow_engine(rng, steps, staleness, when, made):
    engines, slow = rng.choice([2, 3, 8]), rng.choice([0, 1])
    rate, lag = rng.choice([40.0, 3000.0]), rng.uniform(0.15, 0.5)
    figures = {
        f"perf__engine_{i}__tokens_per_s": (after(when, rate, rate * lag) if i == slow else lambda t: rate)
        for i in range(engines)
    }
    made.rows = run(rng, steps, staleness, **figures)


def _cut(rng, steps, staleness, when, made):
    share = rng.choice([0.25, 0.6, 0.95])
    made.rows = run(rng, steps, staleness, response_length__truncated_frac=after(when, 0.03, share))


def _dropped(rng, steps, staleness, when, made):
    made.settings["max_staleness"] = staleness = max(1, staleness)
    made.rows = run(rng, steps, staleness)
    lost, share = 0.0, rng.choice([0.2, 0.4])
    for row in made.rows[1:]:
        here = share if row["step"] / steps > when else 0.0
        lost += sum(rng.random() < here / (1 - here) for _ in range(8))
        row["ledger/filtered(too_old)"] = lost


def _solved(rng, steps, staleness, when, made):
    top = rng.choice([1.0, 1.0, 12.0])
    made.rows = run(
        rng,
        steps,
        staleness,
        reward__mean=after(when, 0.4 * top, 0.985 * top),
        reward__frac_zero_std=after(when, 0.3, 0.95),
    )
    for row in made.rows[1:]:
        row["reward/mean"] = min(row["reward/mean"], top)  # no sample gets more


def _hopeless(rng, steps, staleness, when, made):
    low = rng.choice([0.0, 0.0, -1.0])
    made.rows = run(rng, steps, staleness, reward__mean=lambda t: low, reward__frac_zero_std=after(when, 0.3, 0.96))
    for row in made.rows[1:]:
        row["reward/mean"] = low + abs(rng.gauss(0, 0.004))


def _collapse(rng, steps, staleness, when, made):
    made.since = None
    start = rng.choice([0.4, 2.0, 5.0])
    when = max(when, 0.3)
    made.rows = run(
        rng,
        steps,
        staleness,
        actor__entropy=after(when, start, start * rng.choice([0.01, 0.1])),
        reward__mean=lambda t: 0.3,
    )


def _drift(rng, steps, staleness, when, made):
    made.since = None
    factor, start = rng.choice([0.2, 0.5, 2.2, 6.0]), rng.choice([20, 400])
    made.rows = run(
        rng, steps, staleness, response_length__mean=lambda t: start * factor**t, reward__mean=lambda t: 0.35
    )


def _one_part(rng, steps, staleness, when, made):
    made.since = None
    parts = rng.choice([2, 3])
    figures = {f"reward__other{i}__mean": (lambda t: 0.2) for i in range(parts - 1)}
    made.rows = run(rng, steps, staleness, reward__format__mean=lambda t: 0.1 + 0.8 * t, **figures)


def _stalled(rng, steps, staleness, when, made):
    made.since = None
    made.rows = run(rng, steps, staleness)
    seconds = sorted(row["timing_s/step"] for row in made.rows[1:])
    made.idle_s = max(61.0, rng.uniform(13, 40) * seconds[len(seconds) // 2], 2.1 * seconds[-1])


CAUSES = {
    "engine-bound": _engine_bound,
    "learner-bound": _learner_bound,
    "reward-bound": _reward_bound,
    "one slow engine": _slow_engine,
    "long replies lost": _cut,
    "long replies lost (dropped)": _dropped,
    "solved data": _solved,
    "hopeless data": _hopeless,
    "entropy collapse": _collapse,
    "length drift": _drift,
    "only one part of the reward carries": _one_part,
    "stalled": _stalled,
}


def clean(seed: int) -> Made:
    """An odd run that nothing holds back."""
    rng = random.Random(10_000 + seed)
    steps = rng.choice([17, 24, 41, 90, 250])
    staleness = rng.choice([0, 1, 3])
    kinds = sorted(ODD)
    kind = kinds[seed % len(kinds)]
    made = Made(name=f"{kind} {seed}", cause=None, rows=[], settings={"max_staleness": staleness})
    made.rows = ODD[kind](rng, steps, staleness) or []
    return made


def _with(rng, steps, staleness, change):
    rows = run(rng, steps, staleness)
    for row in rows[1:]:
        change(row)
    return rows


ODD = {
    "plain": lambda r, n, s: run(r, n, s),
    "a few steps": lambda r, n, s: run(r, r.choice([1, 2, 3, 5]), s),
    "no step": lambda r, n, s: run(r, 0, s),
    "a reward from -1 to 1": lambda r, n, s: run(r, n, s, reward__mean=lambda t: -0.8 + 1.2 * t),
    "a reward of thousands": lambda r, n, s: run(r, n, s, reward__mean=lambda t: 2000 + 500 * t),
    "a flat reward": lambda r, n, s: run(r, n, s, reward__mean=lambda t: 0.4),
    "waits near the bound": lambda r, n, s: run(
        r, n, s, perf__trainer_idle_frac=lambda t: 0.62 if not s else 0.42, perf__rollout_idle_frac=lambda t: 0.3
    ),
    "slow first steps": lambda r, n, s: run(
        r, n, s, perf__trainer_idle_frac=after(0.3, 0.95, 0.4), response_length__truncated_frac=after(0.4, 0.9, 0.03)
    ),
    "longer replies that pay": lambda r, n, s: run(
        r, n, s, response_length__mean=lambda t: 100 * (1 + 4 * t), reward__mean=lambda t: 0.1 + 0.7 * t
    ),
    "a low entropy from the start": lambda r, n, s: run(r, n, s, actor__entropy=lambda t: 0.02 * (1 - 0.4 * t)),
    "an entropy that falls as the reward rises": lambda r, n, s: run(
        r, n, s, actor__entropy=lambda t: 2.1 * 0.06**t, reward__mean=lambda t: 0.1 + 0.8 * t
    ),
    "both parts rise": lambda r, n, s: run(
        r, n, s, reward__right__mean=lambda t: 0.1 + 0.6 * t, reward__format__mean=lambda t: 0.3 + 0.6 * t
    ),
    "a part that is at its top already": lambda r, n, s: _with(
        r, n, s, lambda row: row.update({"reward/format/mean": 1.0, "reward/right/mean": row["reward/mean"]})
    ),
    "a penalty that nobody gets": lambda r, n, s: _with(
        r, n, s, lambda row: row.update({"reward/late/mean": 0.0, "reward/right/mean": row["reward/mean"]})
    ),
    "engines of almost one speed": lambda r, n, s: run(
        r, n, s, perf__engine_0__tokens_per_s=lambda t: 900.0, perf__engine_1__tokens_per_s=lambda t: 700.0
    ),
    "an engine that was slow once": lambda r, n, s: run(
        r, n, s, perf__engine_0__tokens_per_s=lambda t: 900.0, perf__engine_1__tokens_per_s=after(0.5, 200.0, 880.0)
    ),
    "null in every third step": lambda r, n, s: _with(
        r, n, s, lambda row: row.update({"actor/entropy": None}) if row["step"] % 3 == 0 else None
    ),
    "single steps far off": lambda r, n, s: _with(
        r,
        n,
        s,
        lambda row: (
            row.update({"perf/trainer_idle_frac": 0.99, "response_length/mean": 9e9, "actor/entropy": 0.0})
            if row["step"] % 11 == 3
            else None
        ),
    ),
    "few groups, mostly equal": lambda r, n, s: run(r, n, s, reward__frac_zero_std=lambda t: 0.7),
}


def causes_named(made: Made, advise) -> set[str]:
    """What is said about a made-up run."""
    return {advice.cause for advice in advise(made.rows, made.settings, made.idle_s)}


def wanted(made: Made) -> str | None:
    """The cause as it is named."""
    return made.cause and made.cause.partition(" (")[0]
