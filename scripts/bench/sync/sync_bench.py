"""How fast do new weights reach an engine? The tables of docs/performance.md.

    python scripts/bench/sync/sync_bench.py --updates 8 --turns 2 --out docs/data/sync.json
    python scripts/bench/sync/sync_bench.py --layers 8 30 60 --bucket-mib 4 64 --out docs/data/sync-sizes.json

The first command takes about 15 minutes on two slow cores. The second one varies the size of the model.

An engine with SmolLM2-135M in bf16 runs in its own actor, as in a run. This process trains a little and sends every
update; AdamW in fp32 makes the bf16 weights change as they do in RL. Channels: shared memory; gloo with changes only;
gloo with whole tensors; and tensor by tensor, one control call and one broadcast each. The engine first waits, as
between the phases of a synchronous run, then it samples without end."""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sync_tables import Record, load_table, medians, size_table
from torch import Tensor

from rl.config import Config, RolloutConfig
from rl.types import Data
from rl.weights import TensorMeta
from trainer.cluster.calls import started
from trainer.cluster.cluster import Cluster
from trainer.cluster.engine_client import EngineClient
from trainer.cluster.placement import place

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "support")]
MODEL = str(ROOT / "models" / "smollm2-135m")
CONFIG = Config(
    name="sync",
    model=MODEL,
    data=lambda: Data(train=[]),
    reward=lambda reply: 0.0,
    dtype="bfloat16",
    device="cpu",
    rollout=RolloutConfig(max_tokens=200, max_model_len=256, max_num_seqs=8, kv_cache_gib=0.5),
)
LEARNING_RATE = 1e-6
CHANNELS = ("shared memory", "gloo, changes", "gloo, whole", "tensor by tensor")
LOADS = {"engine waits": 0, "engine samples": 1}
"""The `max_staleness` of such a run, which decides the threads of each process."""


class Training:
    """SmolLM2 in bf16 with fp32 master weights; each step changes it as a small learning rate does."""

    def __init__(self, model: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self.named = dict(self.model.named_parameters())
        self.masters = [p.detach().float().requires_grad_() for p in self.named.values()]
        self.adam = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(self, seed: int) -> None:
        ids = torch.randint(0, 49000, (1, 32), generator=torch.Generator().manual_seed(seed))
        self.model(input_ids=ids, labels=ids).loss.backward()
        for master, parameter in zip(self.masters, self.named.values(), strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        self.adam.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.named.values(), strict=True):
                parameter.copy_(master)

    def metadata(self) -> list[TensorMeta]:
        return [TensorMeta(name=n, dtype="bfloat16", shape=tuple(p.shape)) for n, p in self.named.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((n, p.detach()) for n, p in self.named.items())

    def flat(self) -> Tensor:
        """All values as they are sent, flat int16."""
        return torch.cat([p.detach().view(-1) for p in self.named.values()]).view(torch.int16)


class Engine:
    """The one engine of a cluster, called from this thread."""

    def __init__(self, cluster: Any) -> None:
        self.actor, self.client = cluster.engines[0], EngineClient(cluster.engines, 1, 120.0)
        self.expected: set[str] = self.call(lambda e: e.expected_weights())

    def begin(self, ask: Callable[[Any], Any]) -> Callable[[], Any]:
        """Start a call; the returned function waits for its result."""
        import ray

        ref = self.actor.ask(ask)
        return lambda: ray.get(ref, timeout=120)

    def call(self, ask: Callable[[Any], Any]) -> Any:
        return self.begin(ask)()


def memcpy_seconds(training: Training, place: Tensor) -> float:
    """Seconds to copy all tensors, one by one, into allocated memory: the lower bound of any transfer."""
    began, at = time.perf_counter(), 0
    for _, tensor in training:
        flat = tensor.view(-1).view(torch.uint8)
        place[at : at + flat.numel()].copy_(flat)
        at += flat.numel()
    return time.perf_counter() - began


def open_channel(kind: str, training: Training, engine: Engine) -> Any:
    import rollout.weights.channel
    import rollout.weights.outbox
    import rollout.weights.sender

    if kind == "tensor by tensor":
        store = rollout.weights.channel.meeting_place("127.0.0.1", 2, 120)
        joined = engine.begin(lambda e: e.rpc("join_per_tensor", store.port))
        group = rollout.weights.channel.group_of(store, 0, 2, 120)
        joined()
        return group
    reserve = rollout.weights.sender.reserve
    rollout.weights.sender.reserve = reserve if kind == "shared memory" else lambda nbytes: ""
    rollout.weights.outbox.ANCHOR_EVERY = 1 if kind == "gloo, whole" else 10**9
    ends = {"weights": training, "expected": engine.expected, "client": engine.client, "rank": 0, "timeout_s": 120.0}
    try:
        return rollout.weights.sender.open_sender("gloo", **ends, address="127.0.0.1", world_size=2)
    finally:
        rollout.weights.sender.reserve = reserve


def one_by_one(group: Any, training: Training, engine: Engine) -> float:
    """An update tensor by tensor; returns the seconds during which sampling stopped."""
    from rollout.weights.channel import broadcast

    engine.call(lambda e: e.pause())
    engine.call(lambda e: e.rpc("begin_per_tensor"))
    for name, tensor in training:
        received = engine.begin(lambda e, name=name, shape=list(tensor.shape): e.rpc("receive_one", name, shape))
        broadcast(group, tensor.contiguous())
        received()
    engine.call(lambda e: e.rpc("end_per_tensor"))
    return engine.call(lambda e: e.resume())


def measure(
    training: Training, engine: Engine, updates: int, turns: int, channels: tuple[str, ...] = CHANNELS
) -> dict[str, Record]:
    """Measure the channels in alternation, so that a slow minute of the machine affects all of them."""
    from density import density

    records = {kind: Record() for kind in channels}
    place = torch.ones(
        2 * training.flat().numel(), dtype=torch.uint8
    )  # `ones` touches its pages; `empty` and `zeros` do not
    for turn in range(turns):
        for kind in channels:
            record, sender = records[kind], open_channel(kind, training, engine)
            for update in range(updates // turns + 1):
                old = training.flat()
                training.step(1000 * turn + update)
                engine.client.version += 1
                began = time.perf_counter()
                if kind == "tensor by tensor":
                    pause = one_by_one(sender, training, engine)
                    seconds = time.perf_counter() - began
                else:
                    sender.send_weights()
                    seconds = time.perf_counter() - began
                    pause = engine.call(lambda e: e.last_pause())
                if update == 0:
                    continue  # a channel's first update sends all values, and touches its memory for the first time
                record.seconds.append(seconds)
                record.pause.append(pause)
                time.sleep(0.3)  # the engine prepares for the next update, which would slow down the copy below
                record.copy.append(memcpy_seconds(training, place))
                if kind == "tensor by tensor":
                    continue
                record.transfer.append(sender.seconds["transfer"])
                record.nbytes.append(sender.outbox.sent_bytes)
                if kind == "gloo, changes":
                    there = density(old, training.flat())
                    record.density.append(there.changed)
                    record.over_bound.append(sender.outbox.sent_bytes / there.bound)
            print(
                f"turn {turn + 1} of {turns}, {kind}: {statistics.median(record.seconds):.2f} s an update", flush=True
            )
    return records


@asynccontextmanager
async def engine_of(config: Config, load: str) -> AsyncIterator[tuple[Cluster, Training, Engine]]:
    """A cluster with one engine under this load, and a trainer."""
    config = replace(config, max_staleness=LOADS[load])
    config = replace(config, rollout=replace(config.rollout, engine_class="sync_engine:Measured"))
    cluster = Cluster(config, replace(place(config, cuda=False, gpus=0), learners=0))
    try:
        cluster.boot()
        await started("the engine", cluster.building[0], 300)
        await cluster.ask_engines(lambda e: e.start())
        torch.set_num_threads(2 - LOADS[load])
        training, engine = Training(config.model), Engine(cluster)
        if LOADS[load]:
            await cluster.ask_engines(lambda e: e.sample_on())
        yield cluster, training, engine
    finally:
        await cluster.aclose()


async def run(load: str, updates: int, turns: int) -> dict[str, Any]:
    """Measure all channels to one engine that waits or samples."""
    async with engine_of(CONFIG, load) as (cluster, training, engine):
        records = await asyncio.to_thread(measure, training, engine, updates, turns)
        return medians(records) | await cluster.ask_engine(0, lambda e: e.sampled(), deadline_s=60)


async def by_size(layers: int, bucket_mib: list[int], updates: int) -> list[dict[str, Any]]:
    """Rows for a model with `layers` layers: every bucket size, and tensor by tensor."""
    import rollout.weights.channel

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        async with engine_of(replace(CONFIG, model=make(layers, folder)), "engine waits") as (_, training, engine):
            for mib in bucket_mib:
                rollout.weights.channel.BUCKET_BYTES = mib * 2**20
                channels = ("shared memory", "gloo, whole") + ("tensor by tensor",) * (mib == bucket_mib[-1])
                records = await asyncio.to_thread(measure, training, engine, updates, 1, channels)
                for kind, r in records.items():
                    row = {"layers": layers, "megabytes": 2e-6 * training.flat().numel(), "channel": kind}
                    row |= {"bucket_mib": mib} if r.transfer else {}
                    row |= {"seconds": statistics.median(r.seconds), "pause_p50": statistics.median(r.pause)}
                    if r.transfer:
                        row["transfer"] = statistics.median(r.transfer)
                        row["of_memcpy"] = statistics.median(c / t for c, t in zip(r.copy, r.transfer, strict=True))
                    rows.append(row)
    return rows


def make(layers: int, folder: str) -> str:
    """Save a random model with the shape of SmolLM2-135M but `layers` layers; returns its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shape = AutoConfig.from_pretrained(MODEL, num_hidden_layers=layers)
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=8, help="measured updates of each channel (default: 8)")
    parser.add_argument("--turns", type=int, default=2, help="rounds over the channels (default: 2)")
    parser.add_argument("--out", help="a JSON file for the figures")
    parser.add_argument("--layers", type=int, nargs="+", help="measure models with these numbers of layers instead")
    parser.add_argument(
        "--bucket-mib", type=int, nargs="+", default=[64], help="with --layers: bucket sizes in MiB (default: 64)"
    )
    args = parser.parse_args()
    if args.layers:
        rows = [row for n in args.layers for row in asyncio.run(by_size(n, args.bucket_mib, args.updates))]
        print(f"\n{size_table(rows)}")
        if args.out:
            Path(args.out).write_text(json.dumps(rows, indent=1) + "\n")
        return
    results = {load: asyncio.run(run(load, args.updates, args.turns)) for load in LOADS}
    for load, result in results.items():
        print(f"\n**The {load}.**\n\n{load_table(result, LEARNING_RATE)}")
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
