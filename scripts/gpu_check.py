"""Does the stack work on this GPU? Log-probability parity, the whole loop, and the speed of a weight update.

    scripts/gpu_check                   # one Hopper GPU, no network, below 8 minutes; --device cpu tries the script

Each phase runs in a process of its own, so that one that crashes or hangs costs only itself. The result is
gpu_check.json (in $OUT, where that is set) and a table; the exit status is 1 if any phase failed.
"""

import argparse
import asyncio
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 470
"""Of the whole script; together the phases' own limits are longer, for not all of them will hang."""
PARITY_LIMIT, CONTROL_LIMIT = 0.05, 0.1
"""Nats of mean |d|: most that fp32 heads on both sides may show in bf16, least that the negative control must show."""
CHARACTERS = "0123456789="
REPLY_TOKENS = 8


def agreement(rollout: list[list[float]], trainer: list[list[float]]) -> dict[str, float]:
    """How far the trainer's log-probabilities are from the engine's about the same tokens, by sequence, in nats.

    With d = trainer - rollout: mean |d|, max |d|, k1 = mean of -d, k3 = mean of e^d - d - 1 (both estimate
    KL(rollout || trainer)), `ess` = (mean of e^d)^2 / mean of e^2d. Standard errors (`_se`) are between sequences,
    for the tokens of one are not independent: sqrt(S / (S - 1) sum_s (sum of s - mean * length of s)^2) / tokens.
    """
    gaps = [[b - a for a, b in zip(r, t, strict=True)] for r, t in zip(rollout, trainer, strict=True)]
    flat = [d for row in gaps for d in row]
    tokens, sequences = len(flat), len(gaps)
    out = {"tokens": tokens, "sequences": sequences, "nll": -sum(map(sum, rollout)) / tokens}
    measures = {"abs_mean": abs, "k1": lambda d: -d, "k3": lambda d: math.expm1(d) - d}
    for name, measure in measures.items():
        mean = sum(map(measure, flat)) / tokens
        spread = sum((sum(map(measure, row)) - mean * len(row)) ** 2 for row in gaps)
        out |= {name: mean, f"{name}_se": math.sqrt(spread * sequences / max(sequences - 1, 1)) / tokens}
    ratios = [math.exp(d) for d in flat]
    ess = sum(ratios) ** 2 / (tokens * sum(r * r for r in ratios))
    return out | {"abs_max": max(map(abs, flat)), "ess": ess}


def make_model(folder: Path, *, nats: float | None = None, device: str = "cpu", **shape: int) -> str:
    """Save a random bf16 Qwen2 with a character tokenizer and tied embeddings.

    With `nats`, the final norm (which scales a tied head's logits) is set so that the mean entropy is about that.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    vocabulary = {c: i for i, c in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    ids = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    settings = {"vocab_size": len(vocabulary), "max_position_embeddings": 1024, "tie_word_embeddings": True} | ids
    with torch.device(device):
        model = Qwen2ForCausalLM(Qwen2Config(**settings | shape))
    if nats is not None:
        with torch.no_grad():
            hidden = model.model(torch.randint(model.config.vocab_size, (4, 64), device=device)).last_hidden_state
            logits = model.lm_head(hidden)
            low, high = 0.01, 1000.0
            for _ in range(30):
                scale = math.sqrt(low * high)
                log_p = (logits * scale).log_softmax(-1)
                entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
                low, high = (scale, high) if entropy > nats else (low, scale)
            model.model.norm.weight.mul_(scale)
    model.to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def base_config(args: argparse.Namespace, model: str, **settings: Any) -> Any:
    """What all phases share."""
    from rl.config import Config, Deadlines, TrackingConfig

    cuda = args.device == "cuda"
    return Config(
        model=model,
        device=args.device,
        share_gpu=cuda,
        save_final=False,
        output_dir=str(Path(args.work) / "runs"),
        tracking=TrackingConfig(wandb="off"),
        deadlines=Deadlines(start_s=150, sample_s=60, step_s=60, sync_s=60),
        **settings,
    )


# -- phases ------------------------------------------------------------------------------------------------------


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What this machine is."""
    import torch

    from trainer.report import stack_versions

    found: dict[str, Any] = {"host": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if args.device == "cuda":
        p = torch.cuda.get_device_properties(0)
        capability = f"sm_{p.major}{p.minor}"
        found |= {"gpu": p.name, "memory_gib": p.total_memory / 2**30, "capability": capability}
        found["cuda"] = torch.version.cuda
    return found | stack_versions()


def parity(args: argparse.Namespace) -> dict[str, Any]:
    """Engine against trainer, fp32 head on and off on either side, and raw log-probabilities as negative control."""
    cpu = args.device == "cpu"
    from rl.config import RolloutConfig
    from rollout.settings import engine_env

    os.environ |= engine_env(device=args.device, backend="gloo" if cpu else "ipc", threads=os.cpu_count() or 1)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 2048}
    if not cpu:
        shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "vocab_size": 32768}
    heads = {"num_attention_heads": shape["hidden_size"] // 64, "num_key_value_heads": 2}
    model = args.model or make_model(Path(args.work) / "peaky", nats=1.5, **shape, **heads)
    prompts = parity_prompts(args.model, shape["vocab_size"], 4 if cpu else 16)
    rollout = RolloutConfig(max_tokens=24 if cpu else 128, max_model_len=256, gpu_memory_utilization=0.3)
    result: dict[str, Any] = {"model": args.model or shape, "rows": [], "problems": []}
    sampled: dict[tuple[str, str, float], Any] = {}
    for fp32, mode, temperatures in (
        (True, "processed", (1.0, 0.7)),
        (False, "processed", (1.0,)),
        (True, "raw", (0.7,)),
    ):
        config = base_config(args, model, name="parity", data=list, reward=float, fp32_head=fp32, rollout=rollout)
        try:
            batches = asyncio.run(sample(config, args.device, mode, prompts, temperatures))
            sampled |= {("fp32" if fp32 else "bf16", mode, t): b for t, b in batches.items()}
        except Exception as error:
            traceback.print_exc()
            result["problems"].append(f"engine fp32_head={fp32} {mode}: {type(error).__name__}: {error}")
    for trainer in ("fp32", "bf16"):
        scores = trainer_scores(model, trainer, args.device, sampled)
        for (engine, mode, temperature), (ours, theirs) in scores.items():
            if trainer == "fp32" or temperature == 1.0:
                row = {"engine": engine, "trainer": trainer, "logprobs": mode, "temperature": temperature}
                result["rows"].append(row | agreement(theirs, ours))
    for row in result["rows"]:
        control = row["logprobs"] == "raw"
        if control and not row["abs_mean"] > CONTROL_LIMIT:
            result["problems"].append(
                f"the negative control shows only {row['abs_mean']:.2g} nats: this check is blind"
            )
        if not control and row["engine"] == row["trainer"] == "fp32" and not row["abs_mean"] < PARITY_LIMIT:
            result["problems"].append(f"fp32 heads at T={row['temperature']} differ by {row['abs_mean']:.2g} nats")
    return result


def parity_prompts(model: str, vocabulary: int, count: int) -> list[list[int]]:
    """Random tokens for a random model, questions for a real one."""
    if not model:
        import torch

        ids = torch.randint(3, vocabulary, (count, 16), generator=torch.Generator().manual_seed(1))
        return ids.tolist()
    from trainer.tokens import load_tokenizer

    tokenizer = load_tokenizer(model)
    return [list(tokenizer.encode(f"Question: what is {i} times {i + 3}? Answer:")) for i in range(2, count + 2)]


async def sample(config: Any, device: str, mode: str, prompts: list[list[int]], temperatures: Any) -> dict[float, Any]:
    """One engine's trajectories of eight samples a prompt, by temperature, as batches."""
    import rollout.engine
    from rl.batch import collate, trajectory
    from rl.types import Prompt

    def args_of(*a: Any, **k: Any) -> dict[str, Any]:
        return original(*a, **k) | {"logprobs_mode": f"{mode}_logprobs"}

    original = rollout.engine.engine_args
    with patch.object(rollout.engine, "engine_args", args_of):
        backend = "gloo" if device == "cpu" else "ipc"
        engine = rollout.engine.Engine(config, device=device, backend=backend, model=config.model)
    try:
        await engine.start()
        out = {}
        for t in temperatures:
            asked = (engine.sample(ids, 8, seed=1000 * i, temperature=t) for i, ids in enumerate(prompts))
            pairs = [
                trajectory(Prompt(ordinal=i, token_ids=prompts[i], task={}), completion, 0.0, {})
                for i, group in enumerate(await asyncio.gather(*asked))
                for completion in group
            ]
            out[t] = collate(pairs)
        return out
    finally:
        await engine.close()


def trainer_scores(model: str, head: str, device: str, batches: dict[Any, Any]) -> dict[Any, Any]:
    """By key of `batches`: the trainer's log-probabilities and the engine's, as lists by sequence."""
    import torch

    from rl.batch import take
    from trainer.model import load

    policy = load(model, dtype="bfloat16", fp32_head=head == "fp32", share_prompts=False).to(device).eval()
    out = {}
    for key, batch in batches.items():
        ours, theirs = [], []
        for rows in torch.arange(len(batch.rewards)).split(16):
            part = take(batch, rows)
            with torch.no_grad():
                logprobs = policy(part.input_ids.to(device), part.mask.to(device), key[2]).logprobs.cpu()
            ours += [r[m].tolist() for r, m in zip(logprobs, part.mask, strict=True)]
            theirs += [r[m].tolist() for r, m in zip(part.rollout_logprobs, part.mask, strict=True)]
        out[key] = (ours, theirs)
    return out


def digits() -> Any:
    """Ten prompts: "7=" asks for "77777777"."""
    from rl.types import Data, Example

    return Data(train=[Example(prompt=f"{d}=", task={"digit": str(d)}) for d in range(10)])


def share_of_echoes(reply: Any) -> float:
    """Share of the reply's places that hold the digit."""
    return reply.text.count(reply.task["digit"]) / REPLY_TOKENS


def loop(args: argparse.Namespace) -> dict[str, Any]:
    """A whole run through the launcher: a random model learns to echo a digit."""
    from rl.config import RolloutConfig, TrainerConfig
    from rl.objectives import GRPO
    from trainer.launch import run

    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    model = make_model(Path(args.work) / "echo", num_attention_heads=4, num_key_value_heads=2, **shape)
    config = base_config(
        args,
        model,
        name="loop",
        data=digits,
        reward=share_of_echoes,
        objective=GRPO(),
        steps=30,
        prompts_per_step=16,
        group_size=8,
        dtype="bfloat16" if args.device == "cuda" else "float32",
        verify_every=10,
        rollout=RolloutConfig(
            max_tokens=REPLY_TOKENS, max_model_len=64, max_num_seqs=128, gpu_memory_utilization=0.3, kv_cache_gib=0.25
        ),
        trainer=TrainerConfig(lr=3e-3),
    )
    summary = run(config)
    rows = [json.loads(line) for line in (Path(config.output_dir) / "loop" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "reward/mean" in row]
    result = {k: summary[k] for k in ("reward_first", "reward_last", "start_seconds", "train_seconds", "tokens")}
    result["rewards"] = [row["reward/mean"] for row in rows]
    for name in ("logprob_abs_diff_mean", "logprob_abs_diff_max", "k3_kl"):
        result[f"worst_{name}"] = max(row[f"rollout_corr/{name}"] for row in rows)
    result["worst_ess"] = min(row["rollout_corr/ess"] for row in rows)
    result["sync_bytes"] = rows[-1]["weight_sync/bytes"]
    # Step 1 pays for warm-up and compilation.
    tokens = [row["response_length/mean"] * config.prompts_per_step * config.group_size for row in rows[1:]]
    for name, key in (("sync_seconds", "weight_sync/seconds"), ("pause_seconds", "weight_sync/pause_seconds")):
        result[name] = middle([row[key] for row in rows[1:]])
    for name, key in (("rollout_tokens_per_s", "wait_for_samples"), ("trainer_tokens_per_s", "learn")):
        result[name] = middle([n / row[f"timing_s/{key}"] for n, row in zip(tokens, rows[1:], strict=True)])
    result["problems"] = []
    if not result["reward_last"] > result["reward_first"] + 0.3:
        result["problems"].append(
            f"the reward went from {result['reward_first']:.2f} to {result['reward_last']:.2f} only"
        )
    return result


def weight_sync(args: argparse.Namespace) -> dict[str, Any]:
    """Seven updates of a model with Qwen2.5-0.5B's shape through the run's own cluster; the first is verified."""
    from rl.config import RolloutConfig
    from trainer.cluster import Cluster
    from trainer.placement import plan
    from trainer.remote import RemoteLearner

    shape = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936}
    if args.device == "cpu":
        shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 8192}
    heads = {"num_attention_heads": shape["hidden_size"] // 64, "num_key_value_heads": 2}
    model = make_model(Path(args.work) / "large", device=args.device, **shape, **heads)
    rollout = RolloutConfig(max_tokens=32, max_model_len=256, gpu_memory_utilization=0.3, kv_cache_gib=0.25)
    config = base_config(args, model, name="sync", data=list, reward=float, rollout=rollout)
    placement = plan(config, cuda=args.device == "cuda")

    async def updates() -> list[Any]:
        cluster = Cluster(config, placement)
        try:
            await cluster.start()
            learner = RemoteLearner(cluster, probe=list(range(3, 11)))
            return [await learner.publish(version) for version in range(1, 8)]
        finally:
            await cluster.close()

    first, *rest = asyncio.run(updates())
    return {
        "backend": placement.backend,
        "bytes": first.bytes,
        "updates": len(rest),
        "verified_seconds": first.seconds,
        "seconds": middle([r.seconds for r in rest]),
        "pause_seconds": middle([r.pause_seconds for r in rest]),
        "gb_per_s": middle([r.bytes / 1e9 / r.seconds for r in rest]),
    }


def middle(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": median(values), "min": min(values), "max": max(values)}


# -- running them ------------------------------------------------------------------------------------------------

PHASES = {
    "environment": (environment, 60),
    "parity": (parity, 240),
    "loop": (loop, 180),
    "weight_sync": (weight_sync, 150),
}
"""By name: the function and its limit in seconds."""


def run_phase(args: argparse.Namespace) -> None:
    """In the phase's own process: write what it found, or its error, to --result."""
    try:
        result = PHASES[args.phase][0](args)
        problems = result.pop("problems", [])
        found = {"ok": not problems, "error": "; ".join(problems) or None, "result": result}
    except BaseException as error:
        traceback.print_exc()
        found = {"ok": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    Path(args.result).write_text(json.dumps(found))
    sys.exit(0 if found["ok"] else 1)


def supervise(name: str, arguments: list[str], work: str, limit: float) -> dict[str, Any]:
    """Run one phase in a process group of its own; it ends, with all that it started, at its limit."""
    result = Path(work) / f"{name}.json"
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, __file__, *arguments, "--phase", name, "--result", str(result), "--work", work]
    print(f"== {name} (at most {limit:.0f} s)", flush=True)
    began = time.perf_counter()
    child = subprocess.Popen(command, env=environ, cwd=work, start_new_session=True)
    try:
        child.wait(timeout=limit)
        late = False
    except subprocess.TimeoutExpired:
        late = True
        for number in (signal.SIGTERM, signal.SIGKILL):  # Ray and vLLM clean up after the first
            try:
                os.killpg(child.pid, number)
                child.wait(timeout=10)
            except (subprocess.TimeoutExpired, ProcessLookupError) as error:
                print(f"   {signal.Signals(number).name}: {type(error).__name__}", flush=True)
    found = {"ok": False, "error": f"exit status {child.returncode}, no result"}
    if late:
        found["error"] = f"still running after {limit:.0f} s"
    elif result.exists():
        found = json.loads(result.read_text())
    found = {"seconds": time.perf_counter() - began} | found
    print(f"== {name}: {'ok' if found['ok'] else 'FAILED'} in {found['seconds']:.1f} s", flush=True)
    return found


def table(phases: dict[str, Any]) -> str:
    """Everything measured, as text."""
    lines = []
    for name, found in phases.items():
        lines.append(
            f"{name:14s} {'ok' if found['ok'] else 'FAILED':7s}{found['seconds']:6.1f} s  {found['error'] or ''}"
        )
        for key, value in found.get("result", {}).items():
            if key == "rows":
                lines.append(
                    "  engine trainer logprobs     T   mean|d| ±se        max|d|   k1 ±se             k3 ±se            ESS     NLL"
                )
                lines += [
                    f"  {r['engine']:6s} {r['trainer']:7s} {r['logprobs']:10s} {r['temperature']:4.1f}  "
                    f"{r['abs_mean']:.2e} ±{r['abs_mean_se']:.0e}  {r['abs_max']:.2e}  {r['k1']:+.2e} ±{r['k1_se']:.0e}  "
                    f"{r['k3']:.2e} ±{r['k3_se']:.0e}  {r['ess']:.4f}  {r['nll']:.2f}"
                    for r in value
                ]
            elif isinstance(value, dict) and "median" in value:
                lines.append(f"  {key}: {value['median']:.4g} ({value['min']:.4g} to {value['max']:.4g})")
            elif key != "rewards":
                lines.append(f"  {key}: {value:.4g}" if isinstance(value, float) else f"  {key}: {value}")
    return "\n".join(lines)


def main() -> None:
    """Run the phases one after the other, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", default="", help="folder of a model for the parity table (default: a random one)")
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES), help="run these phases alone")
    parser.add_argument("--output", default=str(Path(os.environ.get("OUT", ".")) / "gpu_check.json"))
    for hidden in ("--phase", "--result", "--work"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        run_phase(args)
    args.model = str(Path(args.model).resolve()) if args.model else ""
    began, phases = time.perf_counter(), {}
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as work:
        for name in args.only:
            left = LIMIT_S - (time.perf_counter() - began)
            arguments = ["--device", args.device, "--model", args.model]
            phases[name] = supervise(name, arguments, work, max(5.0, min(PHASES[name][1], left)))
            report = {"device": args.device, "seconds": time.perf_counter() - began, "phases": phases}
            Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
    print(table(phases))
    print(f"{time.perf_counter() - began:.0f} s in all; {args.output}")
    sys.exit(0 if all(found["ok"] for found in phases.values()) else 1)


if __name__ == "__main__":
    main()
