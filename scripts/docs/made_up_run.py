"""A made-up run with the marks of a stale prefix cache, in seconds and without an engine: for pictures and trials.

python scripts/docs/made_up_run.py runs/made-up
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
STEPS, GROUPS, REPLIES, FAULT = 10, 8, 6, 4
"""From step FAULT on, the first tokens of each reply see KV of older weights."""
SAYS = (
    "{c}",
    "The product of {a} and {b} is {c}. \U0001f642",
    "To find the product, multiply {a} by {b}:\n\n{a} * {b} = {c}",
    "I think that {a} times {b} equals {d}, because {b} + {b} = {e}.",
    "Let me compute: {a} \u00d7 {b} = {c}. So the final answer is {c}.",
)
TASK = "Solve the following multiplication: {a} * {b}. Give only the result as your final answer."


def main() -> None:
    """Write the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the run, which is made")
    made_up(parser.parse_args().folder)


def made_up(run: Path) -> None:
    """Write a run into a folder."""
    from planted_run import write
    from trainer.prompts import load_tokenizer

    tokenizer = load_tokenizer(str(ROOT / "models" / "smollm2-135m"))
    rng = np.random.default_rng(1)
    made = {step: step_of(step, tokenizer, rng) for step in range(1, STEPS + 1)}
    write(run, {step: (told, seen) for step, (told, seen, _) in made.items()}, tokenizer)
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": float(s), **m}) + "\n" for s, (*_, m) in made.items())
    )
    name = "rollout_corr/logprob_abs_diff_mean"
    text = f"{made[FAULT][2][name]:.2g} nats, healthy below 0.0001. Look which tokens have it: unison view"
    alert = {"step": FAULT, "title": f"{name} left its range", "text": text}
    (run / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    (run / "timeline.jsonl").write_text("".join(times(rng)))


def step_of(step: int, tokenizer, rng):
    """The rows of a step, what the learner saw, and the metrics."""
    from rl.batch import collate
    from rl.episodes.seen import Seen, Why
    from rl.types import Trajectory
    from trainer.record.table import Told

    rows = []
    for group in range(GROUPS):
        a, b = (int(x) for x in rng.integers(2, 10, 2))
        chat = [{"role": "user", "content": TASK.format(a=a, b=b)}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
        for episode in range(REPLIES):
            right = rng.random() < 0.3 + 0.05 * step
            text = SAYS[rng.choice([0, 1, 2, 4]) if right else 3].format(a=a, b=b, c=a * b, d=a * b + 1, e=2 * b)
            ids = [*tokenizer.encode(text), tokenizer.convert_tokens_to_ids("<|im_end|>")]
            n, cut, p = len(ids), int(rng.integers(0, 2 * len(ids))), len(prompt)
            old, new = max(0, step - 2), step - 1
            one = Trajectory(
                group=step * GROUPS + group,
                episode=episode,
                token_ids=[*prompt, *ids],
                mask=[False] * p + [True] * n,
                logprobs=[0.0] * p + [float(x) for x in -np.abs(rng.lognormal(-2, 1.5, n))],
                versions=[-1] * p + [old if i < cut else new for i in range(n)],
                reward=float(right),
                reward_parts={"right": float(right)},
                engine=0,
            )
            rows.append(one)
    batch = collate(rows)
    first = (batch.mask.cumsum(dim=1) - 1).clamp(min=0)
    stale = 0.25 * max(0, step - FAULT + 1) ** 0.5 * torch.exp(-first / 2.5)
    gap = torch.tensor(rng.normal(size=batch.mask.shape), dtype=torch.float32) * (stale + 1e-6)
    gap = torch.minimum(gap, -0.9 * batch.rollout_logprobs)  # no token has a probability above 1
    rewards = batch.rewards.view(GROUPS, REPLIES)
    advantage = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    advantage = advantage.expand(batch.mask.shape).contiguous()
    old = batch.rollout_logprobs + gap
    moved = torch.tensor(rng.normal(0, 0.08, batch.mask.shape), dtype=torch.float32)
    flags = torch.zeros(batch.mask.shape, dtype=torch.int16)
    flags[(moved > 0.18) & (advantage > 0)] = int(Why.CLIPPED_HIGH | Why.NO_GRADIENT)
    flags[(moved < -0.22) & (advantage < 0)] = int(Why.CLIPPED_LOW | Why.NO_GRADIENT)
    flags[advantage == 0] = int(Why.ZERO_ADVANTAGE | Why.NO_GRADIENT)
    numbers = {"old": old, "now": old + moved, "entropy": torch.rand(batch.mask.shape) * 1.5, "advantage": advantage}
    numbers["weight"] = torch.ones(batch.mask.shape)
    seen = Seen(rows=torch.arange(len(rows)), numbers=numbers, flags=flags, old_is_rollout=False)
    told = [Told(trajectory=t, began=1e9 + 5 * step - 4, ended=1e9 + 5 * step - 3) for t in rows]
    for one in told[:REPLIES]:
        solved = replace(one.trajectory, group=900 + step, reward=1.0, reward_parts={"right": 1.0})
        told.append(replace(one, trajectory=solved, end="filtered(zero_advantage)"))
    mask, clip = batch.mask, (flags & int(Why.CLIPPED_HIGH | Why.CLIPPED_LOW)) > 0
    metrics = {
        "reward/mean": float(batch.rewards.mean()),
        "actor/entropy": float(numbers["entropy"][mask].mean()),
        "rollout_corr/logprob_abs_diff_mean": float((old - batch.rollout_logprobs).abs()[mask].mean()),
        "actor/clip_frac": float(clip[mask].float().mean()),
        "response_length/mean": float(mask.sum(1).float().mean()),
        "staleness/mean": float((step - 1 - batch.versions)[mask].float().mean()),
        "timing_s/step": 5.0 + float(rng.normal(0, 0.2)),
        "timing_s/wait_for_samples": 1.0 + float(rng.normal(0, 0.1)),
    }
    return told, [seen], metrics


def times(rng) -> list[str]:
    """The lanes of the run: groups are sampled while the learner learns from those before."""
    from trainer.record.timeline import Timeline

    line, zero = Timeline(), 1e9
    for step in range(1, STEPS + 1):
        at = zero + 5 * step
        line.span("run", 0, "wait for samples", at - 5, at - 4)
        line.span("run", 0, f"learn step {step}", at - 4, at - 0.6)
        line.span("learner rank", 0, "old_logprobs", at - 4, at - 3.2)
        line.span("learner rank", 0, "gradients", at - 3.2, at - 1)
        line.span("learner rank", 0, "optimizer", at - 1, at - 0.7)
        line.span("run", 0, f"update to v{step}", at - 0.6, at - 0.3, pause_s=0.02)
        if step % 5 == 0:
            line.span("run", 0, "checkpoint", at - 0.3, at)
        for group in range(GROUPS):
            began = at - 9 + 0.35 * group
            ended = began + 1 + 1.6 * float(rng.random())
            line.span("engine", 0, f"{REPLIES} samples", began, ended)
            moves = [(s, round(t * 1e6)) for s, t in (("admitted", began), ("sampling", began), ("scoring", ended))]
            moves += [("ready", round((ended + 0.3) * 1e6)), ("training", round((at - 4) * 1e6))]
            line.span("groups", 0, f"group {step * GROUPS + group}", began, at - 0.3, end="trained", moves=moves)
    return line.take()


if __name__ == "__main__":
    main()
