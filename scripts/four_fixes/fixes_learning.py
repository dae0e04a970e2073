"""Short runs of the real loop with an engine that has one fix off; part B of scripts/four_fixes/four_fixes.py."""

import json
import math
import runpy
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch

from rl.config import Config, Deadlines, TrackingConfig
from rl.objectives import GRPO
from rl.parity.gap import clustered_error
from rl.types import Data

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVE = GRPO()
"""GRPO, because one version of staleness alone fills GSPO's clip range and would hide the effect of the fixes."""
METRICS = (
    "actor/clip_frac",
    "actor/entropy",
    "reward/mean",
    "rollout_corr/k3_kl",
    "rollout_corr/kl",
    "staleness/mean",
    "response_length/mean",
)


def learn(engine: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """The curves of one short run. A run that fails returns the curves until then, and its error."""
    from trainer.cluster.remote import RemoteLearner
    from trainer.run import run

    recipe = runpy.run_path(str(ROOT / "recipes" / "quickstart.py"))
    config: Config = replace(
        recipe["config"],
        name="run",
        model=str(ROOT / "models" / "smollm2-135m"),
        data=lambda: Data(train=recipe["products"]().train),
        objective=OBJECTIVE,
        temperature=0.7,
        steps=steps,
        # Few sequences at a time, so sampling takes as long as learning, and updates come while requests are running.
        rollout=replace(recipe["config"].rollout, max_num_seqs=8, engine_class=engine),
        # A third of the recipe's: one version of staleness then changes the policy less than a missing fix does.
        trainer=replace(recipe["config"].trainer, lr=1e-5),
        max_staleness=1,
        old_logprobs="rollout",
        doctor="off",
        seed=seed,
        save_final=False,
        output_dir=str(folder),
        deadlines=Deadlines(sample_s=240, step_s=240, sync_s=120),
        tracking=TrackingConfig(wandb="off", samples_per_step=1000),
    )
    refusals: list[dict[str, Any]] = []
    proof = RemoteLearner._verify

    async def recorded(self: Any, manifest: Any) -> None:
        # A run ends here when engine and trainer disagree. These runs continue, and record that they would have ended.
        try:
            await proof(self, manifest)
        except RuntimeError as error:
            refusals.append({"version": manifest.version, "message": str(error)})

    result: dict[str, Any] = {"seed": seed, "error": None, "refusals": refusals}
    began = time.perf_counter()
    # A run samples a group again if one of its replies was aborted. These runs learn from aborted replies.
    no_resampling = patch("rl.loop.players.reject_aborted", lambda completions: completions)
    with patch.object(RemoteLearner, "_verify", recorded), no_resampling:
        try:
            run(config)
        except Exception as error:  # a run without its fix may end in any way, which is a result
            result["error"] = f"{type(error).__name__}: {error}"
    return result | {"seconds": time.perf_counter() - began, "curves": curves(folder / "run")}


def curves(folder: Path) -> list[dict[str, float]]:
    """One row per step of a run, from its files."""
    if not folder.exists():
        return []
    metrics, samples = ([json.loads(line) for line in (folder / f).open()] for f in ("metrics.jsonl", "samples.jsonl"))
    rows = []
    for m in metrics:
        mine = [s for s in samples if s["step"] == m["step"]]
        if not mine:
            continue
        groups: dict[int, list[tuple[float, bool]]] = {}
        for s in mine:
            groups.setdefault(s["prompt_ordinal"], []).append((s["reward"], s["finish_reason"] != "abort"))
        rewards, whole = torch.tensor(list(groups.values())).unbind(dim=-1)
        whole = whole.bool()
        names = ("step", *METRICS, *(f"{n}_se" for n in METRICS if f"{n}_se" in m))
        row = {name: math.nan if m[name] is None else m[name] for name in names}
        row["reward/mean_se"] = clustered_error(rewards, torch.ones_like(whole))
        if whole.any():
            row |= {"reward/whole": float(rewards[whole].mean()), "reward/whole_se": clustered_error(rewards, whole)}
        row["aborted"] = fmean(s["finish_reason"] == "abort" for s in mine)
        row["crossed"] = fmean(len(s["versions"]) > 1 for s in mine)
        rows.append(row)
    return rows
