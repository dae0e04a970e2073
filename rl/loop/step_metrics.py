"""What does the loop report of a step? Rewards, lengths, staleness, queues and times (explained in docs/metrics.md)."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

from rl.filters import same
from rl.loop.in_flight import InFlight
from rl.loop.ledger import Ledger
from rl.protocols import SyncReport
from rl.types import Trajectory


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of one step."""

    waited: float
    """From its begin until its groups were ready."""
    learned: float
    """In the learner."""
    step: float
    """From its begin until its weights were published."""
    in_flight: float
    """Those of `step` in which some group was sampled or scored."""


def batch_metrics(trajectories: list[Trajectory], version: int, group_size: int) -> dict[str, float]:
    """Rewards, lengths and staleness of a step's samples; `version` is the engines' when the step begins."""
    rewards = [t.reward for t in trajectories]
    lengths = [sum(t.mask) for t in trajectories]
    groups: dict[int, list[float]] = defaultdict(list)
    for t in trajectories:
        groups[t.group].append(t.reward)
    ages = [version - v for t in trajectories for v, m in zip(t.versions, t.mask, strict=True) if m]
    versions = [len({v for v, m in zip(t.versions, t.mask, strict=True) if m}) for t in trajectories]
    metrics = {
        "reward/mean": fmean(rewards),
        "reward/std": stdev(rewards) if len(rewards) > 1 else 0.0,
        "response_length/mean": fmean(lengths),
        "response_length/max": float(max(lengths)),
        "response_length/truncated_frac": fmean(t.finish_reason == "length" for t in trajectories),
        "staleness/mean": fmean(ages),
        "staleness/max": float(max(ages)),
        "staleness/versions_per_sample": fmean(versions),
    }
    for age in range(max(ages) + 1):
        metrics[f"staleness/frac_at_{age}"] = ages.count(age) / len(ages)
    if group_size > 1:
        metrics["reward/frac_zero_std"] = fmean(same(g) for g in groups.values())
    for name in sorted({name for t in trajectories for name in t.reward_parts}):
        metrics[f"reward/{name}/mean"] = fmean(t.reward_parts[name] for t in trajectories if name in t.reward_parts)
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
        "timing_s/wait_for_samples": times.waited,
        "timing_s/learn": times.learned,
        "timing_s/step": times.step,
        "perf/tokens_per_s": tokens / times.step,
        "perf/rollout_tokens_per_s": tokens / times.in_flight if times.in_flight else math.nan,
        "perf/trainer_idle_frac": times.waited / times.step,
        "perf/rollout_idle_frac": max(0.0, 1.0 - times.in_flight / times.step),
    }
