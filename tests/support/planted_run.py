"""A run's folder in which each reason why a token does not learn was planted, written by the product's own code."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rl.batch import collate
from rl.episodes.joined import joined, layout
from rl.episodes.seen import Seen, Watching, Why
from rl.loss import full_loss, prepare
from rl.objectives import GRPO, Objective
from rl.objectives.corrections import Correction, IcePop
from rl.types import Metrics, PolicyOutput, Trajectory, step_of
from trainer.record import vocabulary
from trainer.record.table import Told, untold
from trainer.record.timeline import NAME, Timeline
from trainer.record.writer import Writer


class Letters:
    """A byte-level tokenizer: every byte is a token, and 300 is a special one."""

    class backend_tokenizer:
        @staticmethod
        def to_str() -> str:
            return json.dumps({"decoder": {"type": "ByteLevel"}})

    def get_vocab(self) -> dict[str, int]:
        return {letter: byte for byte, letter in bytes_to_unicode().items()} | {"<|end|>": 300}

    def get_added_vocab(self) -> dict[str, int]:
        return {"<|end|>": 300}


def row(group=0, episode=0, sampled=3, reward=0.0, prompt=2, **more) -> Trajectory:
    """A reply of random tokens, of which the engine gave each the log-probability -1 in version 3."""
    ids = np.random.default_rng(sampled).integers(97, 123, prompt + sampled).tolist()
    mask = [False] * prompt + [True] * sampled
    given = {"token_ids": ids, "mask": mask, "logprobs": [-1.0 if m else 0.0 for m in mask]}
    given |= {"versions": [3 if m else -1 for m in mask]}
    return Trajectory(group=group, episode=episode, reward=reward, **given | more)


def watched(
    rows: list[Trajectory], now: list[float], old: list[float], objective: Objective, correction: Correction
) -> tuple[Seen, Metrics]:
    """One pass of a batch whose policy gives these log-probabilities at the sampled tokens."""
    batch = collate(rows)
    full = torch.zeros(batch.mask.shape)
    batch = replace(batch, old_logprobs=full.masked_scatter(batch.mask, torch.tensor(old)))
    logprobs = full.masked_scatter(batch.mask, torch.tensor(now)).requires_grad_()
    batch, advantages = prepare(objective, batch)
    watching, micro = Watching(batch.mask.shape, False), torch.arange(len(rows))
    logprobs.register_hook(lambda gradient: watching.gradient(micro, batch.mask, gradient))
    at = layout(batch)
    policy = PolicyOutput(logprobs=logprobs, entropy=torch.full(batch.mask.shape, 0.5))
    part, policy, given = joined(step_of(batch), policy, advantages)
    loss, metrics = full_loss(objective, correction, policy, part, given)
    watching.add(micro, at, part, policy, given, metrics)
    loss[part.mask].sum().backward()
    return watching.seen(), metrics


def clipped() -> tuple[list[Trajectory], Seen]:
    """Two groups of two: r = e^(now - old) is above 1.2 with A > 0; below 0.8, and above 3, with A < 0; the second
    group has one reward; in its last token old / rollout = e^-3."""
    rows = [row(reward=1.0), row(episode=1), row(group=1, reward=1.0), row(group=1, episode=1, reward=1.0)]
    now = [-0.5, -1.0, -1.0, -1.5, 0.5, -1.0] + [-1.0] * 5 + [-4.0]
    return rows, watched(rows, now, [-1.0] * 11 + [-4.0], GRPO(dual_clip=3.0), IcePop(low=0.5, high=5.0))[0]


CASES = {
    "clipped high": ("0/0/0/2", "Clipped at the upper bound"),
    "clipped low": ("0/1/0/2", "Clipped at the lower bound"),
    "dual clip": ("0/1/0/3", "Dual clip"),
    "it learned": ("0/0/0/3", "It learned."),
    "zero advantage": ("1/0/0/2", "Its advantage is 0"),
    "weight 0": ("1/1/0/4", "The correction gave it weight 0"),
    "prompt": ("0/0/0/0", "Part of the prompt"),
    "masked": ("2/0/0/2", "Masked: the reply was cut off"),
    "read": ("3/0/0/3", "Read between two turns"),
    "update in mid reply": ("3/0/0/4", "v3 | v4"),
    "outside support": ("4/0/0/2", "Outside the support"),
    "no gradient": ("4/0/0/3", "No gradient reached"),
    "filtered: zero advantage": ("10/0/0/2", "every reply of the group got the same reward"),
    "filtered: too old": ("11/0/0/2", "more than max_staleness versions behind"),
    "filtered: cut off": ("12/0/0/2", "every reply was cut off"),
    "filtered: not finite": ("13/0/0/2", "NaN or infinite"),
    "filtered: too hard": ("14/0/0/2", "its mean reward is too low"),
    "filtered: not applicable": ("15/0/0/0", "the reward did not apply"),
    "failed: environment": ("16/0/0/0", "its environment failed too often. no database"),
    "failed: engine": ("17/0/0/0", "its engines died too often"),
    "failed: judge": ("18/0/0/0", "its judge failed too often"),
    "failed: deadline": ("19/0/0/0", "the time of its episode was over"),
}
"""Group, episode, row and token of each planted case in step 7, and what the page must say there."""


def planted(run: Path) -> Path:
    """The folder; step 7 has the cases."""
    rows, seen = clipped()
    read = replace(row(group=3, sampled=4), mask=[False, False, True, False, True, True], turns=[-1, -1, 0, -1, 1, 1])
    read = replace(read, versions=[-1, -1, 3, -1, 4, 4], logprobs=[0.0, 0.0, -1.0, 0.0, -1.0, -1.0])
    rows += [replace(row(group=2), trained=False, finish_reason="length"), read, row(group=4)]
    width = collate(rows).mask.shape[1]
    numbers = {name: torch.cat([x, torch.zeros(len(x), width - x.shape[1])], dim=1) for name, x in seen.numbers.items()}
    flags = torch.cat([seen.flags, torch.zeros(4, width - seen.flags.shape[1], dtype=torch.int16)], dim=1)
    more = {
        name: torch.full((2, width), value) for name, value in zip(numbers, (-1.0, -1.0, 0.5, 1.0, 1.0), strict=True)
    }
    silent = torch.zeros(2, width, dtype=torch.int16)
    silent[1, 1], silent[1, 2] = int(Why.OUTSIDE | Why.NO_GRADIENT), int(Why.NO_GRADIENT)
    more["now"][1, 1] = -torch.inf
    other = Seen(rows=torch.tensor([5, 6]), numbers=more, flags=silent, old_is_rollout=False)
    seen = replace(seen, numbers=numbers, flags=flags)
    told = [Told(trajectory=t, began=1e9, ended=1e9 + 2) for t in rows]
    told += [Told(trajectory=row(group=g), end=f"filtered({why})") for g, why in enumerate(FILTERED, 10)]
    told += [Told(trajectory=untold(15, [97, 98]), end="filtered(not_applicable)")]
    for g, why in enumerate(("env_error", "engine_lost", "judge_error", "deadline"), 16):
        error = "no database" if why == "env_error" else ""
        told.append(Told(trajectory=untold(g, [97, 98]), end=f"failed({why})", error=error))
    write(run, {7: (told, [seen, other])})
    return run


FILTERED = ("zero_advantage", "too_old", "all_truncated", "nonfinite_logprobs", "too_hard")


def write(run: Path, steps: dict[int, tuple[list[Told], list[Seen]]], tokenizer: object = None) -> None:
    """A run's files with these steps."""
    run.mkdir(parents=True, exist_ok=True)
    for name in ("metrics", "alerts"):
        (run / f"{name}.jsonl").touch()
    with (run / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps({"step": float(step), "reward/mean": 0.25, "actor/entropy": 0.5}) + "\n")
    (run / "config.json").write_text(json.dumps({"name": run.name, "prompts_per_step": 2, "group_size": 2}))
    writer = Writer(run / "rollouts", keep="all", most_bytes=1e12, after=0, alerts=set)
    tokenizer = tokenizer or Letters()
    writer._waiting.put(lambda folder: vocabulary.save(tokenizer, folder))
    for step, (told, seen) in steps.items():
        writer._waiting.put((step, told, seen))
    writer.close()
    writer._thread.join()  # a busy machine takes longer than a run would wait
    assert writer.problem == ""
    timeline = Timeline()
    for step in steps:
        timeline.span("run", 0, f"learn step {step}", 1e9 + step, 1e9 + step + 0.5)
        timeline.span("engine", 0, "8 samples", 1e9 + step, 1e9 + step + 0.7)
        moves = [("sampling", round((1e9 + step) * 1e6)), ("ready", round((1e9 + step + 0.7) * 1e6))]
        timeline.span("groups", 0, f"group {step}", 1e9 + step, 1e9 + step + 1, end="trained", moves=moves)
    with (run / NAME).open("a") as file:
        file.writelines(timeline.take())
