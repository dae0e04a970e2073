"""GSPO and GRPO on a tiny mixture of experts in bf16, with and without router replay; prints a table.

    python scripts/docs/router_replay.py     # as `scripts/interpreted scripts/docs/router_replay.py`; ten minutes

A real vLLM engine (Model Runner V2, which reports experts; on CPU through Triton's interpreter) and a real DeepSpeed
learner in one process. The reward is the share of a reply's tokens in the lower half of the vocabulary. All figures:
docs/data/router_replay.json.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
DATA = ROOT / "docs" / "data" / "router_replay.json"
PROMPTS, GROUP, TOKENS = [[10, 11, 12, 13], [40, 41, 42, 43]], 8, 16
NAMES = ("rollout_corr/k3_kl", "rollout_corr/logprob_abs_diff_mean", "rollout_corr/rerouted_tokens_frac")
NAMES += ("actor/clip_frac",)
MODEL: dict[str, Any] = {
    "family": "qwen3_moe",
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "initializer_range": 0.06,
    "peak": 2.0,
    "experts": 2.0,
}


def train(engine: Any, config: Any, *, replayed: bool, first_version: int, steps: int) -> dict[str, Any]:
    """One run of a few steps; means over its steps, and the reward of the first and the last."""
    from pair import make_learner
    from rl.batch import collate, trajectory
    from rl.types import Prompt

    learner = make_learner(config)
    replay = learner.parts.policy.replay
    assert replay is not None
    replay.counting_only = not replayed  # the engine's experts are then counted, and not used
    sender = engine.open_sender(learner.weights)
    kept: list[dict[str, float]] = []
    rewards: list[float] = []
    for step in range(steps):
        engine.update(sender, first_version + step)
        rows = []
        for i, ids in enumerate(PROMPTS):
            prompt = Prompt(ordinal=i, token_ids=ids, task={})
            for c in engine.sample(ids, GROUP, seed=1000 * step + 100 * i, max_tokens=TOKENS):
                rows.append(trajectory(prompt, c, mean(float(t < 51) for t in c.token_ids), {}))
        rewards.append(mean(t.reward for t in rows))
        kept.append(learner.step(collate(rows)))
    return {name: mean(m[name] for m in kept) for name in NAMES} | {"reward": [rewards[0], rewards[-1]]}


def show(row: dict[str, Any]) -> None:
    """Print one row of the table."""
    k3, d, moved, clipped = (row[name] for name in NAMES)
    cells = [row["objective"], "on" if row["replay"] else "off", f"{k3:.1e}", f"{d:.4f}", f"{moved:.1%}"]
    cells += [f"{clipped:.3f}", "{:.2f}, {:.2f}".format(*row["reward"])]
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Make the four runs, and print one row for each."""
    from live import Live, engine_config
    from models import make_model
    from rl.config import RolloutConfig, TrainerConfig
    from rl.objectives import GRPO, GSPO

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="steps of each run")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the file of figures has already")
    args = parser.parse_args()
    steps = args.steps
    print("| objective | replay | k3 | mean d | tokens with other experts | clip_frac | reward, first and last step |")
    print("|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = json.loads(DATA.read_text()) if args.resume and DATA.exists() else []
    rows = [row for row in rows if row["steps"] == steps]
    for row in rows:
        show(row)
    with tempfile.TemporaryDirectory() as folder:
        rollout = RolloutConfig(
            max_tokens=TOKENS, max_model_len=64, max_num_seqs=16, kv_cache_gib=0.25, router_replay=True
        )
        base = engine_config(
            make_model(Path(folder), **MODEL),
            dtype="bfloat16",
            rollout=rollout,
            trainer=TrainerConfig(lr=1e-3, minibatches=2, zero_stage=1),
            old_logprobs="recompute",
        )
        engine = Live(base, version=-1, load_format="dummy")
        runs = [(objective, replayed) for objective in (GSPO(), GRPO()) for replayed in (False, True)]
        for n, (objective, replayed) in list(enumerate(runs))[len(rows) :]:
            config = replace(base, objective=objective)
            found = train(engine, config, replayed=replayed, first_version=steps * n, steps=steps)
            rows.append({"objective": type(objective).__name__, "replay": replayed, "steps": steps} | found)
            show(rows[-1])
            DATA.write_text(json.dumps(rows, indent=1) + "\n")
        engine.close()


if __name__ == "__main__":
    main()
