"""Does a whole run work? A random model learns to echo a digit, with the doctor's checks at the start."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from echo_task import REPLY_TOKENS, make_model
from gpu.setting import Result, base_config, middle

from rl.config import TrainerConfig
from rl.objectives import GRPO


def loop(args: argparse.Namespace) -> Result:
    """Thirty steps: reward, parity at its worst, seconds of an update, tokens per second of the learner."""
    from trainer.run import run

    cuda = args.device == "cuda"
    model = make_model(Path(args.work) / "echo", hidden=256, inner=512, layers=2)
    # Eager, so that the doctor sees inside the engine's forward pass; the phase `engines` has compiled ones.
    how = {"max_tokens": REPLY_TOKENS, "max_model_len": 64, "max_num_seqs": 128, "enforce_eager": True}
    config = base_config(args, "loop", model, **how)
    config = replace(config, objective=GRPO(), steps=30, prompts_per_step=16, trainer=TrainerConfig(lr=3e-3))
    config = replace(config, verify_every=10, dtype="bfloat16" if cuda else "float32")
    summary = run(config)
    lines = Path(config.output_dir, "loop", "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "reward/mean" in row]
    first, last = summary["reward_first"], summary["reward_last"]
    result = {k: summary[k] for k in ("reward_first", "reward_last", "start_seconds", "train_seconds", "tokens")}
    for name in ("logprob_abs_diff_mean", "logprob_abs_diff_max", "k3_kl"):
        result[f"worst_{name}"] = max(row[f"rollout_corr/{name}"] for row in rows)
    result |= {"worst_ess": min(row["rollout_corr/ess"] for row in rows), "sync_bytes": rows[-1]["weight_sync/bytes"]}
    rows = rows[1:]  # without the first step, which includes warm-up
    for name, key in (("sync_seconds", "weight_sync/seconds"), ("pause_seconds", "weight_sync/pause_seconds")):
        result[name] = middle([row[key] for row in rows])
    result["learn_seconds"] = middle([row["timing_s/learn"] for row in rows])
    problems = [] if last > first + 0.3 else [f"the reward rose only from {first:.2f} to {last:.2f}"]
    return result | {"problems": problems}
