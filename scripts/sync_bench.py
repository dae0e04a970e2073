"""How fast do new weights reach a sampling engine? The tables of docs/performance.md; about 8 minutes on two cores.

python scripts/sync_bench.py [--updates 30] [--turns 3] [--out docs/sync.json]

A real engine with SmolLM2-135M in bf16 samples without end in a process of its own, while this process trains a little
(AdamW in fp32, so that the bf16 weights change as they do in RL) and sends every update. Three channels: shared memory,
gloo with changes only, gloo with whole tensors; and tensor by tensor, one control call and one broadcast each.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl.config import Config, RolloutConfig
from rl.types import Data
from rl.weights import TensorMeta
from rollout.settings import engine_env
from rollout.weights import WorkerExtension

ROOT = Path(__file__).resolve().parent.parent
MODEL = str(ROOT / "models" / "smollm2-135m")
CONFIG = Config(
    name="sync",
    model=MODEL,
    data=lambda: Data(train=[]),
    reward=lambda reply: 0.0,
    dtype="bfloat16",
    rollout=RolloutConfig(max_tokens=200, max_model_len=256, max_num_seqs=8, kv_cache_gib=0.5),
)
LEARNING_RATE = 1e-6
CHANNELS = ("shared memory", "gloo, changes", "gloo, whole", "tensor by tensor")


class PerTensor(WorkerExtension):
    """The worker's side of a send tensor by tensor."""

    def join_per_tensor(self, port: int) -> None:
        from rollout.channel import join

        self.group = join("127.0.0.1", port, 1, 2, 120)

    def begin_per_tensor(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.weight_transfer_engine.model)

    def receive_one(self, name: str, dtype: str, shape: list[int]) -> None:
        from rollout.channel import broadcast

        tensor = broadcast(self.group, torch.empty(shape, dtype=getattr(torch, dtype)))
        self.weight_transfer_engine.model.load_weights([(name, tensor)])

    def end_per_tensor(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        from rollout.weights import forget_heads

        engine = self.weight_transfer_engine
        finalize_layerwise_reload(engine.model, engine.model_config)
        forget_heads(engine.model)


class Training:
    """SmolLM2 in bf16 over fp32 masters; each step changes it as a small learning rate does."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
        self.named = dict(self.model.named_parameters())
        self.masters = [p.detach().float().requires_grad_() for p in self.named.values()]
        self.adam = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, weight_decay=0.0)

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
        """All values as they travel, flat int16."""
        return torch.cat([p.detach().view(-1) for p in self.named.values()]).view(torch.int16)


class Channel:
    """The sender's control calls, which it makes in a thread of its own."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.loop, self.version = engine, asyncio.get_running_loop(), 0

    def call(self, method: str, *args: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(getattr(self.engine, method)(*args), self.loop).result(120)

    def rpc(self, method: str, *args: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(self.engine.llm.collective_rpc(method, args=args), self.loop).result(
            120
        )

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        self.call("init_weight_transfer_engine", info)

    def stage_weights(self, version: int) -> None:
        self.call("stage_weights", version)

    def finish_weight_update(self) -> None:
        self.call("finish_weight_update", self.version)


@dataclass
class Record:
    """What was measured of one channel, one number for each update."""

    seconds: list[float] = field(default_factory=list)
    transfer: list[float] = field(default_factory=list)
    pause: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    over_bound: list[float] = field(default_factory=list)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def memcpy_seconds(training: Training, place: Tensor) -> float:
    """Copying all tensors, one by one, into memory that is there already: what no transfer can beat."""
    began, at = time.perf_counter(), 0
    for _, tensor in training:
        flat = tensor.view(-1).view(torch.uint8)
        place[at : at + flat.numel()].copy_(flat)
        at += flat.numel()
    return time.perf_counter() - began


def open_channel(kind: str, training: Training, client: Channel, expected: set[str]) -> Any:
    import rollout.channel
    import rollout.sender

    if kind == "tensor by tensor":
        port = free_port()
        with ThreadPoolExecutor(1) as pool:
            joined = pool.submit(client.rpc, "join_per_tensor", port)
            group = rollout.channel.join("127.0.0.1", port, 0, 2, 120)
            joined.result()
        return group
    reserve = rollout.sender.reserve
    rollout.sender.reserve = reserve if kind == "shared memory" else lambda nbytes: ""
    rollout.channel.ANCHOR_EVERY = 1 if kind == "gloo, whole" else 10**9
    try:
        return rollout.sender.open_sender(
            "gloo",
            weights=training,
            expected=expected,
            client=client,
            rank=0,
            address="127.0.0.1",
            port=free_port(),
            world_size=2,
            timeout_s=120,
        )
    finally:
        rollout.sender.reserve = reserve


def one_by_one(group: Any, training: Training, client: Channel) -> float:
    """An update tensor by tensor; returns the seconds in which sampling stood still."""
    from rollout.channel import broadcast

    client.call("pause")
    client.rpc("begin_per_tensor")
    for name, tensor in training:
        receiving = asyncio.run_coroutine_threadsafe(
            client.engine.llm.collective_rpc("receive_one", args=(name, "bfloat16", list(tensor.shape))), client.loop
        )
        broadcast(group, tensor.contiguous())
        receiving.result(120)
    client.rpc("end_per_tensor")
    return client.call("resume")


def measure(training: Training, client: Channel, expected: set[str], updates: int, turns: int) -> dict[str, Record]:
    """All channels in turns, so that a slow minute of the machine meets every one."""
    import rollout.channel
    from rollout.sparse import density

    records = {kind: Record() for kind in CHANNELS}
    place = torch.empty(2 * training.flat().numel(), dtype=torch.uint8)
    for turn in range(turns):
        for kind in CHANNELS:
            record, sender = records[kind], open_channel(kind, training, client, expected)
            count = updates // turns if kind != "tensor by tensor" else 2
            for update in range(count + 1):
                old = training.flat()
                training.step(1000 * turn + update)
                client.version += 1
                rollout.channel.ANCHOR_EVERY = 1 if kind == "gloo, whole" else 10**9
                began = time.perf_counter()
                if kind == "tensor by tensor":
                    pause = one_by_one(sender, training, client)
                else:
                    sender.send_weights()
                    pause = client.call("last_pause")
                seconds = time.perf_counter() - began
                if update == 0:
                    continue  # a channel's first update is always whole, and touches its memory for the first time
                record.seconds.append(seconds)
                record.pause.append(pause)
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


async def sample_on(engine: Any, stop: asyncio.Event) -> int:
    """Requests without end; returns how many were answered."""
    served = 0
    while not stop.is_set():
        await engine.sample([1, 2, 3, 4 + served % 50], 4, None, max_tokens=64)
        served += 4
    return served


async def run(updates: int, turns: int) -> dict[str, Any]:
    from rollout.engine import Engine

    overrides = {"load_format": "auto", "worker_extension_cls": "sync_bench.PerTensor"}
    engine = Engine(CONFIG, device="cpu", backend="gloo", model=MODEL, version=0, overrides=overrides)
    await engine.start()
    try:
        training = Training()
        client, stop = Channel(engine), asyncio.Event()
        sampling = [asyncio.create_task(sample_on(engine, stop)) for _ in range(2)]
        expected = await engine.expected_weights()
        records = await asyncio.to_thread(measure, training, client, expected, updates, turns)
        stop.set()
        served = sum(await asyncio.gather(*sampling))
        counters = await engine.counters()
    finally:
        await engine.close()
    return table(records) | {"requests": served, "aborted": counters["aborted"]}


def table(records: dict[str, Record]) -> dict[str, Any]:
    """Medians, and the 99th percentile of the pause."""
    rows = {}
    for kind, r in records.items():
        row: dict[str, Any] = {"updates": len(r.seconds), "seconds": statistics.median(r.seconds)}
        pauses = sorted(r.pause)
        row["pause_p50"], row["pause_p99"] = (
            statistics.median(pauses),
            pauses[min(len(pauses) - 1, int(0.99 * len(pauses)))],
        )
        row["pause_share"] = row["pause_p99"] / row["seconds"]
        if r.transfer:
            row["transfer"] = statistics.median(r.transfer)
            row["of_memcpy"] = statistics.median(c / t for c, t in zip(r.copy, r.transfer, strict=True))
            row["megabytes"] = statistics.median(r.nbytes) / 1e6
        if r.density:
            row["density"], row["over_bound"] = statistics.median(r.density), max(r.over_bound)
        rows[kind] = row
    slow = rows["tensor by tensor"]["seconds"]
    for row in rows.values():
        row["times_faster"] = slow / row["seconds"]
    return {"rows": rows}


def show(result: dict[str, Any]) -> str:
    head = (
        "| channel | update, s | faster | transfer, s | of memcpy | MB | pause p50, s | pause p99, s | p99 / update |"
    )
    lines = [head, "|---" * 9 + "|"]
    for kind, r in result["rows"].items():
        moved = f"{r['transfer']:.3f} | {r['of_memcpy']:.0%} | {r['megabytes']:.1f}" if "transfer" in r else "| |"
        lines.append(
            f"| {kind} | {r['seconds']:.2f} | {r['times_faster']:.1f}x | {moved} | {r['pause_p50']:.3f} | "
            f"{r['pause_p99']:.3f} | {r['pause_share']:.0%} |"
        )
    changes = result["rows"]["gloo, changes"]
    lines.append(
        f"\n{changes['density']:.2%} of the values changed in an update (learning rate {LEARNING_RATE:g}); the payload "
        f"is at most {changes['over_bound']:.2f} times its entropy bound. {result['requests']} requests were served "
        f"meanwhile, {result['aborted']} aborted."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=30, help="measured updates of each channel")
    parser.add_argument("--turns", type=int, default=3, help="in how many turns")
    parser.add_argument("--out", help="write the figures there, as JSON")
    args = parser.parse_args()
    os.environ |= engine_env(device="cpu", backend="gloo", threads=1)
    result = asyncio.run(run(args.updates, args.turns))
    print(show(result))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
