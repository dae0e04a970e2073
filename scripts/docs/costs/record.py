"""What does the record cost? CPU seconds of a step of the quickstart's shape, and bytes of a token."""

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from costs.clock import ROOT, Figures


def record(pairs: int, file: Path) -> Figures:
    """Steps of the quickstart's shape: the record's own work, and whole steps of the learner with it and without."""
    import numpy as np
    from made_up_run import step_of

    from trainer.prompts import load_tokenizer

    rng, tokenizer = np.random.default_rng(1), load_tokenizer(str(ROOT / "models" / "smollm2-135m"))
    steps = [step_of(step, tokenizer, rng)[:2] for step in range(1, 13)]
    with tempfile.TemporaryDirectory() as folder:
        own, size = own_work(Path(folder), steps, tokenizer)
    step_s = quickstart_s()
    found: Figures = {
        "CPU seconds of the record's own work for a step": ((own,), None),
        "seconds of a step of the quickstart (docs/data/quickstart.json)": ((step_s,), None),
        "share of a step": ((own / step_s,), 0.02),
        "bytes a token of 48 replies of some 15 tokens": ((size,), None),
    }
    for passes, moved in (("one pass a step, as by default", 0.0), ("several passes a step", 1e-2)):
        with tempfile.TemporaryDirectory() as folder:
            size = long_replies(Path(folder), moved)
        found[f"bytes a token of 512 replies of 350 tokens, {passes}"] = ((size,), 6.0)
    if pairs:
        with tempfile.TemporaryDirectory() as folder:
            paired(Path(folder), steps, tokenizer, pairs, file)
        for name, bound in (("CPU", 0.02), ("clock", None)):
            shares = [row[name]["on"] / row[name]["off"] - 1 for row in lines(file)]
            error = statistics.stdev(shares) / len(shares) ** 0.5
            middle, of_all = statistics.median(shares), (statistics.fmean(shares), error, len(shares))
            found[f"share of a quarter of the learner's step by {name}, median of pairs"] = ((middle,), bound)
            found[f"the same by {name}: mean, its standard error, pairs"] = (of_all, None)
    return found


def quickstart_s() -> float:
    """Seconds of a step of the quickstart, with its share of the evaluations between steps: the middle seed's."""
    runs = json.loads((ROOT / "docs" / "data" / "quickstart.json").read_text())["runs"]
    return statistics.median(run["train_seconds"] for run in runs) / 12


def recorder(folder: Path, tokenizer: Any) -> Any:
    from rl.config import Config
    from rl.types import Data
    from trainer.record.recorder import RunRecord

    config = Config(name="t", model="m", data=lambda: Data(train=[]), reward=len)
    return RunRecord(folder, config, tokenizer=tokenizer, after=0, alert=print, alerts=[])


def recorded(kept: Any, step: int, told: list[Any], seen: list[Any]) -> None:
    """All that the loop tells a record in one step; returns when the step is on the disk."""
    import threading

    for group in {one.trajectory.group for one in told}:
        for state in ("admitted", "sampling", "scoring", "ready", "training", "trained"):
            kept.moved(group, state)
    kept.seen, done = seen, threading.Event()
    kept.trained(step, [one.trajectory for one in told if one.end == "trained"])
    kept.writer._waiting.put(lambda folder: done.set())
    done.wait()


def own_work(folder: Path, steps: list[Any], tokenizer: Any) -> tuple[float, float]:
    """CPU seconds of a step: what is kept of each pass, the events, the table and the file; and bytes of a token."""
    import torch

    from rl.batch import collate
    from rl.episodes.seen import Watching
    from rl.types import PolicyOutput

    kept, seconds, tokens = recorder(folder, tokenizer), [], 0
    for number, (told, seen) in enumerate(steps, 1):
        rows = [one.trajectory for one in told if one.end == "trained"]
        batch = collate(rows)
        tokens += sum(len(row.token_ids) for row in rows)
        zero = torch.zeros(batch.mask.shape)
        watching = Watching(batch.mask.shape, False)
        began = time.process_time()
        for micro in torch.arange(len(rows)).split(4):  # the quickstart's micro-batches hold about four rows
            part = replace(batch, mask=batch.mask[micro], old_logprobs=zero[micro])
            policy = PolicyOutput(logprobs=zero[micro], entropy=zero[micro])
            watching.add(micro, None, part, policy, zero[micro], {})
            watching.gradient(micro, part.mask, zero[micro])
        watching.seen()
        recorded(kept, number, told, seen)
        seconds.append(time.process_time() - began)
    kept.close()
    return statistics.median(seconds[1:]), sum(each.bytes for each in kept.writer.kept.values()) / tokens


def long_replies(folder: Path, moved: float) -> float:
    """Bytes of a token of 512 replies of 350 tokens to 64 prompts of 60, whose numbers are spread as those of a real
    model; `moved` nats is what the step's passes changed."""
    import numpy as np
    import torch

    from planted_run import row
    from rl.episodes.seen import NUMBERS, Seen
    from trainer.record.table import Told, table_of
    from trainer.record.writer import Writer

    rng, n, rows = np.random.default_rng(0), 350, []
    words = rng.permutation(49_000)
    for i in range(512):
        one = row(group=i // 8, episode=i % 8, sampled=n, prompt=60, reward=float(i % 3 == 0))
        sampled = (-np.minimum(rng.lognormal(-2.0, 2.0, n), 20.0)).tolist()
        prompt = words[rng.zipf(1.3, 60) % 49_000].tolist() if one.episode == 0 else rows[-1].token_ids[:60]
        ids = [*prompt, *words[rng.zipf(1.3, n) % 49_000].tolist()]
        rows.append(replace(one, logprobs=[0.0] * 60 + sampled, token_ids=ids))
    told = [Told(trajectory=one) for one in rows]
    rollout = torch.tensor([one.logprobs[1:] for one in rows])
    old = rollout + torch.randn(rollout.shape) * 1e-6
    numbers = {"old": old, "now": old + torch.randn(rollout.shape) * moved, "weight": torch.ones(rollout.shape)}
    numbers |= {"entropy": -rollout * torch.rand(rollout.shape), "advantage": torch.randn(512, 1).expand(rollout.shape)}
    flags = torch.zeros(rollout.shape, dtype=torch.int16)
    seen = Seen(rows=torch.arange(512), numbers={k: numbers[k] for k in NUMBERS}, flags=flags, old_is_rollout=False)
    writer = Writer(folder, keep="all", most_bytes=1e12, after=0, alerts=set)
    writer.close()
    writer._write(1, table_of(1, told, [seen]), "all")
    return writer.kept[1].bytes / (512 * (n + 60))


def lines(file: Path) -> list[dict[str, Any]]:
    """The pairs that a file has."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def paired(folder: Path, steps: list[Any], tokenizer: Any, pairs: int, file: Path) -> None:
    """Add the pairs that a file lacks: seconds of a learner's step with the record and without, of CPU and clock. Each
    is a quarter of the quickstart's step: what else runs on the machine changes little between two short steps, and the
    record writes four files where it would write one."""
    import torch

    from live import engine_config
    from pair import make_learner
    from rl.batch import collate
    from rl.config import TrainerConfig
    from rl.objectives import GSPO

    torch.set_num_threads(1)
    trainer = TrainerConfig(lr=1e-7, zero_stage=0, micro_batch_tokens=256)
    config = engine_config(ROOT / "models" / "smollm2-135m", objective=GSPO(), trainer=trainer)
    off = replace(config, tracking=replace(config.tracking, rollouts="off"))
    learner, kept = make_learner(config), recorder(folder, tokenizer)

    def one(step: int, on: bool) -> tuple[float, float]:
        trained = [row for row in steps[step // 4 % len(steps)][0] if row.end == "trained"]
        told = trained[step % 4 * 12 :][:12]
        learner.stepper.rank = replace(learner.parts, config=config if on else off)
        batch = collate([row.trajectory for row in told])
        cpu, clock = time.process_time(), time.perf_counter()
        learner.step(batch)
        seen, spans = learner.told()
        if on:
            for name, start, end in spans:
                kept.timeline.span("learner rank", 0, name, start, end)
            recorded(kept, step + 1, told, [seen])
        return time.process_time() - cpu, time.perf_counter() - clock

    left = range(len(lines(file)), pairs)
    if left:
        one(left[0], False)  # the first step of a process is slower
    for pair in left:
        took = {on: one(pair, on) for on in ((True, False) if pair % 2 == 0 else (False, True))}
        row = {name: {"on": took[True][i], "off": took[False][i]} for i, name in enumerate(("CPU", "clock"))}
        with file.open("a") as kept_pairs:
            kept_pairs.write(json.dumps(row) + "\n")
    kept.close()
