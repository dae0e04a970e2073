"""What a batch of trajectories says before any training (rewards, lengths, staleness), and how fast it was learned."""

from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean, pstdev

from rl.types import Trajectory


def batch_metrics(trajectories: list[Trajectory], version: int, group_size: int) -> dict[str, float]:
    """Metrics (DESIGN: names in docs/metrics.md) of one step that begins while the engines hold `version`."""
    rewards = [t.reward for t in trajectories]
    lengths = [sum(t.mask) for t in trajectories]
    groups: dict[int, list[float]] = defaultdict(list)
    for t in trajectories:
        groups[t.group].append(t.reward)
    ages = [version - v for t in trajectories for v, m in zip(t.versions, t.mask, strict=True) if m]
    versions = [len({v for v, m in zip(t.versions, t.mask, strict=True) if m}) for t in trajectories]
    metrics = {
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards),
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
        metrics["reward/frac_zero_std"] = fmean(pstdev(g) == 0 for g in groups.values())
    for name in sorted({name for t in trajectories for name in t.reward_parts}):
        metrics[f"reward/{name}/mean"] = fmean(t.reward_parts[name] for t in trajectories if name in t.reward_parts)
    return metrics


def trainer_speed(learned: Mapping[str, float], seconds: float) -> dict[str, float]:
    """How fast a learner was that says in its metrics what it did, and took `seconds` for the whole step."""
    over_seconds = {"perf/trained_tokens": "perf/trainer_tokens_per_s", "perf/ideal_learn_s": "perf/mfu"}
    return {rate: learned[name] / seconds for name, rate in over_seconds.items() if name in learned}
