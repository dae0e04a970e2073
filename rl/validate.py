"""Can these settings work together? The rules of the run itself; objectives, rewards and filters state their own."""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

from rl.agents.context import check_agent
from rl.config import Config
from rl.environments.check import check_environment, class_of
from rl.objectives.rules import check_objective
from rl.rewards.combined import Weighted
from rl.rewards.shaping import SoftOverlong
from rl.sampling.forbidden import check_stops
from rl.tokens import check_template


def check(config: Config) -> None:
    """Raise ValueError, with the remedy, for settings that cannot work together. Starts and loads nothing.

    Every part of a run can forbid settings with a method `check(self, config)` that raises ValueError: objectives and
    corrections have one, rewards and filters may have one.
    """
    _check_counts(config)
    _check_memory_settings(config)
    if config.temperature <= 0:
        raise ValueError(
            f"temperature={config.temperature}: greedy samples have no log-probability to learn from; use a "
            "temperature above 0 (eval_temperature may be 0)"
        )
    _check_episodes(config)
    _check_judges(config)
    check_objective(config)
    check_template(config.chat_template_kwargs)
    config.correction.check(config)
    for part in (*config.filters, *_nested(config.reward), *_nested(config.eval_reward)):
        if rule := own_rule(part):
            rule(config)
    r = config.rollout
    if r.truncation:
        r.truncation.check()
    check_stops(r)
    if r.router_replay and not r.prefix_cache:
        raise ValueError("rollout.router_replay=True needs rollout.prefix_cache=True: vLLM keeps experts by its blocks")
    if r.max_engines is not None and (r.max_engines < r.engines or config.share_gpu):
        least = f"must be at least rollout.engines={r.engines}, and is not for share_gpu=True"
        raise ValueError(f"rollout.max_engines={r.max_engines} {least}")
    if r.max_tokens >= r.max_model_len:
        raise ValueError(f"rollout.max_tokens={r.max_tokens} leaves no room for a prompt in {r.max_model_len} tokens")
    rows = config.prompts_per_step * config.group_size
    if config.trainer.minibatches > rows:
        raise ValueError(f"trainer.minibatches={config.trainer.minibatches} exceeds the {rows} sequences of a step")


def _nested(reward: object) -> Iterator[object]:
    """A reward, and those inside of it."""
    yield reward
    inner = [member for member, _ in reward.members.values()] if isinstance(reward, Weighted) else []
    for one in [reward.reward] if isinstance(reward, SoftOverlong) else inner:
        yield from _nested(one)


def own_rule(part: object) -> Callable[[Config], None] | None:
    """The method `check(self, config)` of a reward or filter, if it has one; a `check` of other arguments is not it."""
    rule: Any = getattr(part, "check", None)
    if not inspect.ismethod(rule) or list(inspect.signature(rule).parameters) != ["config"]:
        return None
    return rule


def _check_counts(config: Config) -> None:
    r, t = config.rollout, config.trainer
    at_least_one = {
        "": (config, ("steps", "prompts_per_step", "group_size", "eval_samples", "max_filtered", "keep_last")),
        "rollout.": (r, ("max_tokens", "max_num_seqs", "max_num_batched_tokens")),
        "trainer.": (t, ("epochs", "minibatches", "micro_batch_tokens")),
    }
    for prefix, (part, names) in at_least_one.items():
        for name in names:
            value = getattr(part, name)
            if value is not None and value < 1:
                raise ValueError(f"{prefix}{name}={value} must be at least 1")
    for name in ("lr", "value_lr", "warmup_steps", "weight_decay"):
        if (getattr(t, name) or 0.0) < 0:
            raise ValueError(f"trainer.{name}={getattr(t, name)} must not be negative")
    if not 0 < config.tracking.rollouts_gib < math.inf:
        given = config.tracking.rollouts_gib
        raise ValueError(f"tracking.rollouts_gib={given:g} must be above 0; tracking.rollouts=off keeps none")
    off = {
        "save_every": (config.save_every, "makes no checkpoint"),
        "eval_every": (config.eval_every, "evaluates at the start and the end only"),
        "verify_every": (config.verify_every, "checks the first update only"),
        "record_batches": (config.record_batches, "keeps none"),
        "max_staleness": (config.max_staleness, "is synchronous"),
        "env_workers": (config.env_workers, "keeps environments in the driver's process"),
        "rollout.retries": (r.retries, "counts a group as failed when its engine is lost"),
        "rollout.restarts": (r.restarts, "ends the run when an engine is lost"),
    }
    for name, (value, meaning) in off.items():
        if value < 0:
            raise ValueError(f"{name}={value} must be at least 0 (0 {meaning})")


def _check_episodes(config: Config) -> None:
    if not 0 <= config.max_failed < 1:
        raise ValueError(f"max_failed={config.max_failed:g} must be a share from 0 to below 1, such as 0.1")
    if not config.episodic and config.env_workers:
        raise ValueError(f"env_workers={config.env_workers} has no environment to host: set env or agent, or remove it")
    if config.tools and config.env is None:
        raise ValueError(
            "tools are for the episodes of an env, and this run has none: write a class with __init__(self, task) and "
            "reward(self, episode), and give it as env"
        )
    if not config.episodic:
        return
    if config.env is None:
        check_agent(config.agent)
    else:
        check_environment(class_of(config.env))
    if config.rollout.min_tokens:
        raise ValueError(
            f"rollout.min_tokens={config.rollout.min_tokens} with episodes: the engine counts the tokens of each "
            "turn, and the trainer those of a whole episode; use min_tokens=0"
        )


def _check_judges(config: Config) -> None:
    labels = [judge.label for judge in config.judges]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(f"two judges have the name {min(twice)!r}, which their metrics need: write name='...' in each")
    if config.env_workers and config.judges:
        raise ValueError(
            f"env_workers={config.env_workers} with judges: their bounds, and the engines of reward models, are the "
            "driver's, where waiting for a judge holds up nobody; use env_workers=0"
        )


def _check_memory_settings(config: Config) -> None:
    t = config.trainer
    if t.zero_stage == 0 and config.dtype == "bfloat16":
        raise ValueError(
            "trainer.zero_stage=0 with dtype=bfloat16 has no fp32 gradients, and Adam's step count starts one too high "
            "(in DeepSpeed 0.19): use zero_stage=1, which never needs more memory, or dtype=float32"
        )
    if t.zero_stage == 0 and t.offload != "none":
        raise ValueError(f"trainer.offload={t.offload} needs DeepSpeed's own optimizer: use zero_stage 1, 2 or 3")
    if t.sequence_parallel < 1 or t.ranks % t.sequence_parallel:
        raise ValueError(f"trainer.sequence_parallel={t.sequence_parallel} must divide trainer.ranks={t.ranks}")
    if t.lora.rank < 0 or t.lora.alpha <= 0:
        raise ValueError(f"trainer.lora: rank={t.lora.rank} must be at least 0, and alpha={t.lora.alpha:g} above 0")
