"""Does the stack work on this GPU? Log-probability parity, a whole run, and the speed of a weight update.

    scripts/gpu_check                   # one Hopper GPU, no network, below 8 minutes; --device cpu tries the script

Each phase runs in its own process, so a crash or a hang ends only that phase. The result is gpu_check.json (in $OUT if
it is set) and a table. The exit status is 1 if any phase failed.
"""

import argparse
import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from echo_task import REPLY_TOKENS, digits, make_model, share_of_echoes

from rl.batch import collate, take, trajectory
from rl.config import Config, Deadlines, RolloutConfig, TrackingConfig, TrainerConfig
from rl.objectives import GRPO
from rl.parity.gap import Gap, gap
from rl.types import Prompt
from rollout.settings import engine_env
from trainer.cluster.placement import place
from trainer.machine import cores
from trainer.model.policy import load
from trainer.prompts import load_tokenizer
from trainer.runs.settings import stack_versions

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 470  # of the whole script; the phases' limits add up to more, because not all of them will hang
PARITY_LIMIT = 0.05  # nats of mean |d| that fp32 heads on both sides may show over a bf16 body
CONTROL_FACTOR = 3  # the negative control's gap must be so many times that of processed log-probabilities
ENGINES = (("fp32", "processed", (1.0, 0.7)), ("bf16", "processed", (1.0,)), ("fp32", "raw", (0.7,)))


def middle(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def base_config(args: argparse.Namespace, name: str, model: str, **rollout: int) -> Config:
    """The settings that all phases share; not every phase uses data and reward."""
    rollouts = RolloutConfig(gpu_memory_utilization=0.3, kv_cache_gib=0.25, **rollout)
    deadlines = Deadlines(start_s=150, sample_s=60, step_s=60, sync_s=60)
    where = {"device": args.device, "share_gpu": args.device == "cuda", "output_dir": f"{args.work}/runs"}
    config = Config(name=name, model=model, data=digits, reward=share_of_echoes, rollout=rollouts, **where)
    return replace(config, tracking=TrackingConfig(wandb="off"), save_final=False, deadlines=deadlines)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """This machine's hardware and software."""
    found: dict[str, Any] = {"cores": cores()}
    if args.device == "cuda":
        p = torch.cuda.get_device_properties(0)
        found |= {"gpu": p.name, "memory_gib": p.total_memory / 2**30, "capability": f"{p.major}.{p.minor}"}
        found["cuda"] = torch.version.cuda
    return found | stack_versions()


def parity(args: argparse.Namespace) -> dict[str, Any]:
    """Engine against trainer, fp32 head on and off on each side, and raw log-probabilities as a negative control."""
    cpu = args.device == "cpu"
    shape = {"hidden": 512, "inner": 1408, "layers": 12, "vocabulary": 32768}
    shape = {"hidden": 128, "inner": 256, "layers": 4, "vocabulary": 2048} if cpu else shape
    model = args.model or make_model(Path(args.work) / "peaky", nats=3.0, **shape)
    encode = load_tokenizer(model).encode  # the random model's tokenizer knows only the digits
    prompts = [encode(f"Question: what is {i} times {i + 3}? Answer:") for i in range(2, 6 if cpu else 18)]
    config = base_config(args, "parity", model, max_tokens=24 if cpu else 128, max_model_len=256)
    sampled: dict[tuple[str, str, float], Any] = {}
    rows, problems = [], []
    for head, kind, temperatures in ENGINES:
        try:
            batches = asyncio.run(sample(replace(config, fp32_head=head == "fp32"), kind, prompts, temperatures))
            sampled |= {(head, kind, t): batch for t, batch in batches.items()}
        except Exception as error:  # recorded, and the other engines are still measured
            traceback.print_exc()
            problems.append(f"engine with {head} head, {kind}: {type(error).__name__}: {error}")
    for trainer in ("fp32", "bf16"):
        for (engine, kind, t), found in trainer_gaps(model, trainer, args.device, sampled).items():
            if trainer == "fp32" or t == 1.0:
                row = {"engine": engine, "trainer": trainer, "kind": kind, "temperature": t}
                rows.append(row | {k: v for k, v in found.plain().items() if k != "worst"})
    gaps = {(r["kind"], r["temperature"]): r["mean_abs"] for r in rows if r["engine"] == r["trainer"] == "fp32"}
    raw, processed = gaps.pop(("raw", 0.7), math.nan), gaps.get(("processed", 0.7), math.nan)
    problems += [
        f"fp32 heads at T={t} differ by {gap:.2g} nats" for (_, t), gap in gaps.items() if not gap < PARITY_LIMIT
    ]
    if not raw > CONTROL_FACTOR * processed:
        gaps_text = f"raw log-probabilities differ by {raw:.2g} nats, processed ones by {processed:.2g}"
        problems.append(f"{gaps_text}: the check detects nothing")
    return {"model": args.model or shape, "rows": rows, "problems": problems}


async def sample(config: Config, kind: str, prompts: list[list[int]], temperatures: list[float]) -> dict[float, Any]:
    """One engine's samples with their log-probabilities, eight of each prompt: one batch per temperature."""
    from rollout.engine import Engine

    overrides = {"logprobs_mode": f"{kind}_logprobs", "load_format": "auto"}
    backend = "gloo" if config.device == "cpu" else "ipc"
    engine = Engine(config, device=config.device, backend=backend, model=config.model, version=0, overrides=overrides)
    try:
        await engine.start()
        batches = {}
        for t in temperatures:
            asked = (engine.sample(ids, 8, seed=1000 * i, temperature=t) for i, ids in enumerate(prompts))
            groups = enumerate(await asyncio.gather(*asked))
            pairs = [(Prompt(ordinal=i, token_ids=prompts[i], task={}), c) for i, group in groups for c in group]
            batches[t] = collate([trajectory(prompt, c, 0.0, {}) for prompt, c in pairs])
        return batches
    finally:
        await engine.close()


def trainer_gaps(model: str, head: str, device: str, batches: dict[Any, Any]) -> dict[Any, Gap]:
    """The gap between trainer and engine for each batch."""
    policy = load(model, dtype="bfloat16", fp32_head=head == "fp32", share_prompts=False).to(device).eval()
    gaps = {}
    for key, batch in batches.items():
        trainer = torch.zeros(batch.mask.shape)
        for rows in torch.arange(len(batch.rewards)).split(16):
            part = take(batch, rows)
            with torch.no_grad():
                trained = policy(part.input_ids.to(device), part.mask.to(device), key[2]).logprobs.cpu()
            trainer[rows, : trained.shape[1]] = trained
        gaps[key] = gap(trainer, batch.rollout_logprobs, batch.mask)
    return gaps


def loop(args: argparse.Namespace) -> dict[str, Any]:
    """A whole run: a random model learns to echo a digit."""
    from trainer.run import run

    model = make_model(Path(args.work) / "echo", hidden=256, inner=512, layers=2)
    config = base_config(args, "loop", model, max_tokens=REPLY_TOKENS, max_model_len=64, max_num_seqs=128)
    config = replace(config, objective=GRPO(), steps=30, prompts_per_step=16, trainer=TrainerConfig(lr=3e-3))
    config = replace(config, verify_every=10, dtype="bfloat16" if args.device == "cuda" else "float32")
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
    for name, key in (("rollout_tokens_per_s", "wait_for_samples"), ("trainer_tokens_per_s", "learn")):
        result[name] = middle([row["response_length/mean"] * 128 / row[f"timing_s/{key}"] for row in rows])
    problems = [] if last > first + 0.3 else [f"the reward rose only from {first:.2f} to {last:.2f}"]
    return result | {"problems": problems}


def weight_sync(args: argparse.Namespace) -> dict[str, Any]:
    """Seven updates of a model with Qwen2.5-0.5B's shape through the run's own cluster; the first is verified."""
    from trainer.cluster.cluster import Cluster
    from trainer.cluster.remote import RemoteLearner

    shape = {"hidden": 896, "inner": 4864, "layers": 24, "vocabulary": 151936}
    shape = {"hidden": 256, "inner": 1024, "layers": 4, "vocabulary": 8192} if args.device == "cpu" else shape
    model = make_model(Path(args.work) / "large", **shape)
    config = base_config(args, "sync", model, max_tokens=32, max_model_len=256)
    placement = place(config, cuda=args.device == "cuda")

    async def updates() -> list[Any]:
        cluster = Cluster(config, placement)
        try:
            cluster.boot()
            await cluster.start()
            learner = RemoteLearner(cluster, probe=list(range(3, 11)))
            return [await learner.publish(version) for version in range(7)]
        finally:
            await cluster.close()

    first, *rest = asyncio.run(updates())
    seconds, pauses = [r.seconds for r in rest], [r.pause_seconds for r in rest]
    speeds = {"gb_per_s": middle([first.bytes / 1e9 / s for s in seconds])}
    result = {"backend": placement.backend, "bytes": first.bytes, "updates": len(rest), "verified_s": first.seconds}
    return result | speeds | {"seconds": middle(seconds), "pause_seconds": middle(pauses)}


PHASES = {
    "environment": (environment, 120),
    "parity": (parity, 240),
    "loop": (loop, 180),
    "weight_sync": (weight_sync, 150),
}


def run_phase(args: argparse.Namespace) -> None:
    """Run in the phase's own process: write its result or its error to --result."""
    try:
        result = PHASES[args.phase][0](args)
        problems = result.pop("problems", [])
        found = {"ok": not problems, "error": "; ".join(problems), "result": result}
    except BaseException as error:
        traceback.print_exc()
        found = {"ok": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    Path(args.result).write_text(json.dumps(found))
    sys.exit(0 if found["ok"] else 1)


def supervise(name: str, arguments: list[str], work: str, limit: float) -> dict[str, Any]:
    """Run one phase in its own process group; at its time limit, end it with every process that it started."""
    result = Path(work) / f"{name}.json"
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if name == "parity":  # the other phases' engines get it from the cluster
        cpu = "cpu" in arguments
        environ |= engine_env(device="cpu" if cpu else "cuda", backend="gloo" if cpu else "ipc", threads=cores())
    environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    command = [sys.executable, __file__, *arguments, "--phase", name, "--result", str(result), "--work", work]
    print(f"== {name} (at most {limit:.0f} s)", flush=True)
    began = time.perf_counter()
    child = subprocess.Popen(command, env=environ, cwd=work, start_new_session=True)
    found: dict[str, Any] = {"ok": False}
    try:
        child.wait(timeout=limit)
        found["error"] = f"exit status {child.returncode} and no result"
        found = json.loads(result.read_text()) if result.exists() else found
    except subprocess.TimeoutExpired:
        found["error"] = f"still running after {limit:.0f} s"
    finally:
        for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 0)):  # Ray and vLLM clean up after the first
            if child.poll() is None:
                os.killpg(child.pid, number)
                time.sleep(patience)
    found["seconds"] = time.perf_counter() - began
    print(f"== {name}: {'ok' if found['ok'] else 'FAILED'} in {found['seconds']:.1f} s", flush=True)
    return found


def closing_table(phases: dict[str, Any]) -> str:
    """All results as text."""
    lines = []
    for name, found in phases.items():
        lines.append(f"{name:13s}{'ok' if found['ok'] else 'FAILED':8s}{found['seconds']:.1f} s  {found['error']}")
        for key, value in found.get("result", {}).items():
            if key == "rows" and value:
                table = [
                    list(value[0]),
                    *([x if isinstance(x, str) else f"{x:.3g}" for x in r.values()] for r in value),
                ]
                lines += ["  " + "".join(f"{x:>12s}" for x in row) for row in table]
            else:
                spread = isinstance(value, dict) and "median" in value
                lines.append(
                    f"  {key}: " + ("{median:.4g} ({min:.4g} to {max:.4g})".format(**value) if spread else f"{value}")
                )
    return "\n".join(lines)


def main() -> None:
    """Run the phases in sequence, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--model", default="", help="folder of a model for the parity table (default: a random model)")
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES), help="run only these phases")
    parser.add_argument(
        "--output", default=str(Path(os.environ.get("OUT", ".")) / "gpu_check.json"), help="JSON to write"
    )
    for internal in ("--phase", "--result", "--work"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        run_phase(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # lets `supervise` end its phase
    arguments = ["--device", args.device, "--model", str(Path(args.model).resolve()) if args.model else ""]
    began, phases = time.perf_counter(), {}
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as work:
        for name in args.only:
            left = LIMIT_S - (time.perf_counter() - began)
            phases[name] = supervise(name, arguments, work, max(5.0, min(PHASES[name][1], left)))
            report = {"device": args.device, "seconds": time.perf_counter() - began, "phases": phases}
            Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
    print(closing_table(phases), f"{report['seconds']:.0f} s in all; {args.output}", sep="\n")
    sys.exit(0 if all(found["ok"] for found in phases.values()) else 1)


if __name__ == "__main__":
    main()
