"""What does the loop report of a step? Rewards, lengths, staleness, queues and times (explained in docs/metrics.md)."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from rl.episodes.rows import by_episode, turns_of
from rl.filters import same
from rl.loop.in_flight import InFlight
from rl.loop.ledger import Ledger
from rl.protocols import SyncReport
from rl.types import Trajectory


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of one step."""

    between: float
    """Since the step before it and its evaluation: checkpoint, samples, trackers."""
    waited: float
    """From its begin until its groups were ready."""
    learned: float
    """In the learner."""
    step: float
    """From its begin until its weights were published."""
    in_flight: float
    """Those of `step` in which some group was sampled or scored."""


def batch_metrics(trajectories: list[Trajectory], version: int, group_size: int) -> dict[str, float]:
    """Rewards, lengths and staleness of a step's episodes; `version` is the engines' when the step begins."""
    episodes = [[trajectories[i] for i in of] for of in by_episode(trajectories)]
    first = [rows[0] for rows in episodes]
    rewards = [t.reward for t in first]
    groups: dict[int, list[float]] = defaultdict(list)
    for t in first:
        groups[t.group].append(t.reward)
    sampled = [sum((sampled_by(t) for t in rows), Counter[int]()) for rows in episodes]
    lengths = [versions.total() for versions in sampled]
    ages = Counter[int]()
    for versions in sampled:
        ages.update({version - v: tokens for v, tokens in versions.items()})
    tokens = ages.total()
    metrics = {
        "reward/mean": fmean(rewards),
        "reward/std": stdev(rewards) if len(rewards) > 1 else 0.0,
        "response_length/mean": fmean(lengths),
        "response_length/max": float(max(lengths)),
        "response_length/truncated_frac": fmean(t.finish_reason == "length" for t in first),
        "staleness/mean": sum(age * of for age, of in ages.items()) / tokens,
        "staleness/max": float(max(ages)),
        "staleness/versions_per_sample": fmean(len(versions) for versions in sampled),
    }
    for age in range(max(ages) + 1):
        metrics[f"staleness/frac_at_{age}"] = ages[age] / tokens
    if len(groups) > 1:
        # Samples of one prompt are alike, so its group counts once.
        metrics["reward/mean_se"] = stdev(fmean(g) for g in groups.values()) / math.sqrt(len(groups))
    if group_size > 1:
        metrics["reward/frac_zero_std"] = fmean(same(g) for g in groups.values())
    for name in sorted({name for t in first for name in t.reward_parts}):
        paid = [t.reward_parts[name] for t in first if name in t.reward_parts]
        metrics[f"reward/{name}/mean"] = fmean(paid)
        if len(paid) < len(first):
            metrics[f"reward/{name}/left_out_frac"] = 1 - len(paid) / len(first)
    return metrics | turn_metrics(episodes)


def sampled_by(row: Trajectory) -> Counter[int]:
    """How many of a row's tokens each version sampled."""
    versions, tokens = np.unique(np.asarray(row.versions)[np.asarray(row.mask, dtype=bool)], return_counts=True)
    return Counter(dict(zip(versions.tolist(), tokens.tolist(), strict=True)))


def turn_metrics(episodes: list[list[Trajectory]]) -> dict[str, float]:
    """Turns and rows of the episodes, each given by its rows, and what a turn was paid. Empty where all are of one."""
    if not any(t.row or t.turns is not None for rows in episodes for t in rows):
        return {}
    turns = [{turn for t in rows for turn in turns_of(t) if turn >= 0} for rows in episodes]
    metrics = {
        "episode/turns": fmean(len(of) for of in turns),
        "episode/turns_max": float(max(len(of) for of in turns)),
        "episode/rows": fmean(len(rows) for rows in episodes),
    }
    paid: dict[int, float] = defaultdict(float)
    for t in (t for rows in episodes for t in rows):
        for i, amount in t.paid or ():
            paid[turns_of(t)[i]] += amount
    for turn in sorted(paid):
        metrics[f"reward/turn_{turn}"] = paid[turn] / sum(turn in of for of in turns)
    return metrics


def trainer_speed(learned: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Trainer throughput (tokens per second) and MFU from the learner's own counts; `seconds` is its whole step."""
    over_seconds = {"perf/trained_tokens": "perf/trainer_tokens_per_s", "perf/ideal_learn_s": "perf/mfu"}
    return {rate: learned[name] / seconds for name, rate in over_seconds.items() if name in learned}


def queue_metrics(ledger: Ledger, in_flight: InFlight) -> dict[str, float]:
    """How many groups are on their way when a step begins, and the age of the oldest in seconds."""
    queues = {f"queue/{state}": float(ledger.count(state)) for state in ("sampling", "scoring", "ready")}
    oldest = in_flight.oldest()
    return queues | {"queue/oldest_s": oldest[1] if oldest else 0.0}


def ledger_metrics(ledger: Ledger) -> dict[str, float]:
    """Prompts by state since the start of the run, and the share that became too old."""
    counts = {f"ledger/{state}": float(n) for state, n in ledger.summary().items()}
    too_old = ledger.count("filtered(too_old)")
    return counts | {"staleness/dropped_frac": too_old / (too_old + ledger.count("trained"))}


def sync_metrics(sync: SyncReport, version: int) -> dict[str, float]:
    """What the weight update to `version` cost."""
    return {
        "weight_sync/seconds": sync.seconds,
        "weight_sync/pause_seconds": sync.pause_seconds,
        "weight_sync/bytes": float(sync.bytes),
        "weight_sync/version": float(version),
        "weight_sync/verified": float(sync.verified),
        "weight_sync/failed": float(sync.failed),
    }


def timing_metrics(tokens: int, times: StepTimes) -> dict[str, float]:
    """Where the time of a step of so many sampled tokens went."""
    return {
        "timing_s/between_steps": times.between,
        "timing_s/wait_for_samples": times.waited,
        "timing_s/learn": times.learned,
        "timing_s/step": times.step,
        "perf/tokens_per_s": tokens / times.step,
        "perf/rollout_tokens_per_s": tokens / times.in_flight if times.in_flight else math.nan,
        "perf/trainer_idle_frac": times.waited / times.step,
        "perf/rollout_idle_frac": max(0.0, 1.0 - times.in_flight / times.step),
    }
