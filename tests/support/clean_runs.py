"""Odd but legal runs, in which the doctor must find nothing."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from exam import ROLLOUT, TEMPLATE, configured, exam_config, examine, fill_adapters, start
from live import Live
from models import FAMILIES, make_model
from pair import Pair, make_learner
from rl.config import Config, Lora, TrainerConfig
from rl.objectives import GRPO, PPO

CHAT: list[Any] = [[{"role": "user", "content": f"{a} plus {7**a % 1000} is"}] for a in range(8)]
SHORT: list[Any] = [[20 + i] for i in range(8)]
LONG: list[Any] = [[(7 * i + j) % 90 + 3 for j in range(180)] for i in range(4)]
MIXED: list[Any] = ["a", "12+34=", [5], "the quick brown fox jumps over the lazy dog " * 3, "?", "x y z"]
LLAMA, QWEN = {"family": "llama", "tied": True}, {"family": "qwen2"}


@dataclass(frozen=True, kw_only=True)
class CleanRun:
    """One run without a fault."""

    name: str
    model: dict[str, Any] = field(default_factory=lambda: dict(QWEN))
    dtype: str = "float32"
    prompts: list[Any] = field(default_factory=lambda: CHAT)
    rollout: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    """Settings of the config that the engine needs at its start."""
    seed: int = 0

    @property
    def engine(self) -> tuple[str, str]:
        """Runs with the same key share an engine."""
        return str([sorted(self.model.items(), key=str), self.start]), self.dtype


def clean_runs() -> list[CleanRun]:
    """All of them; those that share an engine are together."""
    found = [CleanRun(name=f"T = {t:g}", changes={"temperature": t}) for t in (0.05, 0.2, 0.5, 1.0, 1.3, 1.7)]
    found += [
        CleanRun(name="one-token prompts", prompts=SHORT),
        CleanRun(name="one-token replies", rollout={"max_tokens": 1}),
        CleanRun(name="one-token prompts and replies", prompts=SHORT, rollout={"max_tokens": 1}),
        CleanRun(name="two-token replies at T = 1.7", rollout={"max_tokens": 2}, changes={"temperature": 1.7}),
        CleanRun(name="long prompts", prompts=LONG),
        CleanRun(name="prompts of all lengths", prompts=MIXED),
        CleanRun(name="one prompt", prompts=CHAT[:1]),
        CleanRun(name="one prompt 8 times", prompts=CHAT[:1] * 8),
        CleanRun(name="prompts of one repeated token", prompts=[[20 + i] * 40 for i in range(8)]),
        CleanRun(name="most replies end at once", rollout={"stop_token_ids": tuple(range(3, 80))}),
        CleanRun(name="groups of 2", changes={"group_size": 2}, prompts=CHAT[:2]),
        CleanRun(name="PPO with groups of 1", changes={"objective": PPO(), "group_size": 1}),
        CleanRun(name="GRPO with staleness", changes={"objective": GRPO(), "max_staleness": 2}),
        CleanRun(name="top-p 0.9", rollout={"top_p": 0.9}),
        CleanRun(name="top-p 0.3 at T = 1.5", rollout={"top_p": 0.3}, changes={"temperature": 1.5}),
        CleanRun(name="top-k 5", rollout={"top_k": 5}),
        CleanRun(name="top-k 1", rollout={"top_k": 1}),
        CleanRun(name="min-p 0.1", rollout={"min_p": 0.1}),
        CleanRun(name="top-p, top-k and min-p", rollout={"top_p": 0.95, "top_k": 30, "min_p": 0.02}),
        CleanRun(name="min_tokens 12", rollout={"min_tokens": 12}),
        CleanRun(name="bad words", rollout={"bad_words": ("e", "to")}),
        CleanRun(name="min_tokens with top-p", rollout={"min_tokens": 6, "top_p": 0.9}),
        CleanRun(name="stop tokens", rollout={"stop_token_ids": (20, 30, 40)}),
        CleanRun(name="stop texts", rollout={"stop": ("a", "+")}),
        CleanRun(name="long replies", rollout={"max_tokens": 128}),
        CleanRun(name="prompts not shared", changes={"trainer": TrainerConfig(share_prompts=False)}),
        CleanRun(name="tiny micro-batches", changes={"trainer": TrainerConfig(micro_batch_tokens=40)}),
        CleanRun(name="adapters", changes={"trainer": TrainerConfig(lora=Lora(rank=4))}),
        CleanRun(
            name="adapters of rank 1, alpha 64", changes={"trainer": TrainerConfig(lora=Lora(rank=1, alpha=64.0))}
        ),
    ]
    found += [CleanRun(name=f"seed {seed}", seed=seed) for seed in (11, 12, 13)]
    found += [CleanRun(name=f"tied, T = {t:g}", model=LLAMA, changes={"temperature": t}) for t in (0.3, 1.0)]
    found += [
        CleanRun(name="bf16", dtype="bfloat16"),
        CleanRun(name="bf16, T = 0.3", dtype="bfloat16", changes={"temperature": 0.3}),
        CleanRun(name="bf16, T = 1.5", dtype="bfloat16", changes={"temperature": 1.5}),
        CleanRun(name="bf16, one-token replies", dtype="bfloat16", rollout={"max_tokens": 1}),
        CleanRun(name="bf16, one-token prompts", dtype="bfloat16", prompts=SHORT),
        CleanRun(name="bf16, bad words", dtype="bfloat16", rollout={"bad_words": ("e",)}),
        CleanRun(name="bf16, adapters", dtype="bfloat16", changes={"trainer": TrainerConfig(lora=Lora(rank=4))}),
        CleanRun(name="bf16, PPO", dtype="bfloat16", changes={"objective": PPO(), "group_size": 1}),
    ]
    listed = [n for n in FAMILIES if n not in ("Llama", "Llama, tied", "Qwen2")]
    found += [CleanRun(name=n, model=dict(FAMILIES[n]), changes={"temperature": 0.7}, prompts=MIXED) for n in listed]
    found += [
        CleanRun(name="head in bf16 on both sides", dtype="bfloat16", start={"fp32_head": False}),
        CleanRun(name="no prefix cache", start={"rollout": replace(ROLLOUT, prefix_cache=False)}),
    ]
    found += [CleanRun(name="several EOS", model=QWEN | {"stops": [1, 3, 40]}, prompts=MIXED)]
    return found


class CleanBench:
    """Runs them, with one engine at a time."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.live: Live | None = None
        self.engine: tuple[str, str] | None = None
        self.base: Config | None = None
        self.learners: dict[str, Any] = {}
        self.version = -1

    def faults(self, run: CleanRun) -> list[str]:
        """What the doctor finds in a run; the text of an exception if it ends in one."""
        if self.engine != run.engine:
            self._start(run)
        assert self.base
        assert self.live
        changes = dict(run.changes)
        trainer = changes.get("trainer", TrainerConfig())
        with_values = "objective" in changes
        key = f"{trainer} {with_values}"
        config = replace(self.base, **changes, rollout=replace(self.base.rollout, **run.rollout))
        pair = self._pair(key, replace(config, rollout=self.base.rollout))
        try:
            with configured(pair, config):
                pair.version = self.live.engine.version
                return [str(f) for f in examine(pair, run.prompts, run.seed).faults]
        except Exception as error:
            return [f"crash: {type(error).__name__}: {error}"]

    def _start(self, run: CleanRun) -> None:
        self.close()
        folder = Path(self.folder.name, str(len(list(Path(self.folder.name).iterdir()))))
        model = make_model(folder, chat_template=TEMPLATE, **run.model)
        self.base = exam_config(model, **({"dtype": run.dtype} | run.start))
        self.live, self.engine = start(self.base), run.engine

    def _pair(self, key: str, config: Config) -> Pair:
        assert self.live
        if key not in self.learners:
            self.learners[key] = make_learner(config)
        pair = Pair(config, self.live, self.learners[key])
        if config.trainer.lora.rank:
            fill_adapters(pair)
        return pair

    def close(self) -> None:
        """End the engine."""
        if self.live:
            self.live.close()
        self.live, self.engine, self.learners = None, None, {}


def run_all(only: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each run's name and what the doctor found in it."""
    bench = CleanBench()
    try:
        for run in clean_runs():
            if not only or any(text in run.name for text in only):
                yield run.name, bench.faults(run)
    finally:
        bench.close()
