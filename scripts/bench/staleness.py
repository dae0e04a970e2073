"""How stale may samples be? Learning at fixed lags, without and with correction.

    python scripts/bench/staleness.py --seeds 5 --steps 60 --out docs/data/staleness.json  # 15 minutes on two cores

A small model learns to echo a digit eight times, with the framework's learner. Every batch is sampled from the weights
of exactly `lag` updates ago. This is the worst case of an asynchronous run: every reply as late as `max_staleness`
allows, while a run's mean staleness is about half its bound. The sampler is plain PyTorch in fp32, so only the lag
differs.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import torch

from rl.batch import collate, trajectory
from rl.config import Config, TrainerConfig
from rl.objectives import GRPO, GSPO
from rl.objectives.corrections import TokenTIS, Uncorrected
from rl.types import Completion, Data, Prompt

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts")]
LAGS = (0, 1, 4, 8)
PROMPTS, GROUP, REPLY = 10, 8, 8
SETTINGS: dict[str, dict[str, Any]] = {
    "GRPO, uncorrected": {"objective": GRPO(), "old_logprobs": "recompute", "correction": Uncorrected()},
    "GRPO, clipped against the rollout": {"objective": GRPO(), "old_logprobs": "rollout"},
    "GRPO, token TIS": {"objective": GRPO(), "old_logprobs": "recompute", "correction": TokenTIS(cap=2.0)},
    "GSPO, uncorrected": {"objective": GSPO(), "old_logprobs": "recompute"},
    "GSPO, clipped against the rollout": {"objective": GSPO(), "old_logprobs": "rollout"},
}


@torch.no_grad()
def sample(hf: Any, generator: torch.Generator) -> list[Any]:
    """A batch of replies with the log-probabilities under which they were sampled."""
    prompts = [Prompt(ordinal=d, token_ids=[3 + d, 13], task={}) for d in range(PROMPTS)]
    ids = torch.tensor([p.token_ids for p in prompts for _ in range(GROUP)])
    sampled = []
    for _ in range(REPLY):
        log_p = hf(input_ids=ids).logits[:, -1].float().log_softmax(-1)
        token = torch.multinomial(log_p.exp(), 1, generator=generator)
        sampled.append(log_p.gather(1, token))
        ids = torch.cat([ids, token], dim=1)
    logprobs, rows = torch.cat(sampled, dim=1).tolist(), []
    for i, reply in enumerate(ids[:, 2:].tolist()):
        prompt = prompts[i // GROUP]
        reward = reply.count(prompt.token_ids[0]) / REPLY
        done = Completion(token_ids=reply, logprobs=logprobs[i], versions=[0] * REPLY, finish_reason="length")
        rows.append(trajectory(prompt, done, reward, {}))
    return rows


def learn(setting: str, lag: int, seed: int, steps: int, lr: float, folder: str) -> dict[str, float]:
    """One run: mean reward over its last quarter and over all steps, and the ESS that remains at this lag."""
    from echo_task import make_model
    from transformers import AutoModelForCausalLM

    import trainer.learner.learner
    from trainer.learner.learner import Learner

    torch.manual_seed(seed)
    model = make_model(Path(folder) / f"seed-{seed}", hidden=128, inner=256, layers=2)
    config = Config(
        name="staleness",
        model=model,
        data=lambda: Data(train=[]),
        reward=lambda reply: 0.0,
        dtype="float32",
        trainer=TrainerConfig(lr=lr, micro_batch_tokens=4096),
        **SETTINGS[setting],
    )
    if torch.distributed.is_initialized():
        # The learners of one process, in sequence, share one process group.
        trainer.learner.learner.join_group = lambda *_: None
    learner = Learner(config, rank=0, device="cpu", address="127.0.0.1", port=0, model=model)
    versions: deque[dict[str, torch.Tensor]] = deque(maxlen=lag + 1)
    generator, rewards, ess = torch.Generator().manual_seed(1000 + seed), [], []
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    targets = dict(plain.named_parameters())
    for _ in range(steps):
        versions.append({name: tensor.clone() for name, tensor in learner.weights})
        for name, tensor in versions[0].items():
            targets[name].data.copy_(tensor)
        rows = sample(plain, generator)
        rewards.append(statistics.mean(t.reward for t in rows))
        metrics = learner.step(collate(rows))
        ess.append(metrics.get("rollout_corr/ess", math.nan))
    tail = [e for e in ess[lag:] if math.isfinite(e)]
    return {
        "last": statistics.mean(rewards[-steps // 4 :]),
        "all": statistics.mean(rewards),
        "ess": statistics.mean(tail) if tail else math.nan,
    }


def interval(values: list[float]) -> str:
    """Mean and half the width of its 95 % confidence interval (Student's t for 5 values: 2.776)."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), 2.0)
    return f"{statistics.mean(values):.3f} ± {t * statistics.stdev(values) / len(values) ** 0.5:.3f}"


def table(found: dict[str, dict[int, list[dict[str, float]]]]) -> str:
    lines = ["| | " + " | ".join(f"lag {lag}" for lag in LAGS) + " | ESS at lag 8 |", "|---" * (len(LAGS) + 2) + "|"]
    for setting, by_lag in found.items():
        cells = [interval([run["all"] for run in by_lag[lag]]) for lag in LAGS]
        ess = statistics.mean(run["ess"] for run in by_lag[LAGS[-1]])
        lines.append(f"| {setting} | " + " | ".join(cells) + f" | {ess:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs per setting and lag (default: 5)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a run (default: 60)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 1e-3)")
    parser.add_argument("--out", help="a JSON file for the figures")
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    found: dict[str, dict[int, list[dict[str, float]]]] = {s: {lag: [] for lag in LAGS} for s in SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for setting in SETTINGS:
                for lag in LAGS:
                    run = learn(setting, lag, seed, args.steps, args.lr, folder)
                    found[setting][lag].append(run)
                    print(f"seed {seed}, {setting}, lag {lag}: {run}", flush=True)
    print(table(found))
    if args.out:
        Path(args.out).write_text(json.dumps({"lr": args.lr, "steps": args.steps, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
