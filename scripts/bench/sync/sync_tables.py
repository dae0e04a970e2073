"""The records of scripts/bench/sync/sync_bench.py, and the tables that it prints from them."""

import statistics
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Record:
    """Measurements of one channel, one number per update; seconds and bytes."""

    seconds: list[float] = field(default_factory=list)
    transfer: list[float] = field(default_factory=list)
    pause: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    over_bound: list[float] = field(default_factory=list)


def medians(records: dict[str, Record]) -> dict[str, Any]:
    """Medians, and the 99th percentile of the pause."""
    rows = {}
    for kind, r in records.items():
        row: dict[str, Any] = {"updates": len(r.seconds), "seconds": statistics.median(r.seconds)}
        pauses = sorted(r.pause)
        row["pause_p50"] = statistics.median(pauses)
        row["pause_p99"] = pauses[min(len(pauses) - 1, int(0.99 * len(pauses)))]
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


def load_table(result: dict[str, Any], learning_rate: float) -> str:
    """Markdown: one row per channel, for an engine under one load."""
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
        f"\n{changes['density']:.2%} of the values changed in an update (learning rate {learning_rate:g}); the payload "
        f"is at most {changes['over_bound']:.2f} times its entropy bound. "
        f"During the updates {result['served']} requests were served and {result['aborted']} aborted."
    )
    return "\n".join(lines)


def size_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one row per model size, channel and bucket size."""
    lines = ["| layers | MB | channel | bucket, MiB | update, s | faster | transfer, s | of memcpy |", "|---" * 8 + "|"]
    slow = {r["layers"]: r["seconds"] for r in rows if r["channel"] == "tensor by tensor"}
    for r in rows:
        moved = f"{r['transfer']:.3f} | {r['of_memcpy']:.0%}" if "transfer" in r else "|"
        lines.append(
            f"| {r['layers']} | {r['megabytes']:.0f} | {r['channel']} | {r.get('bucket_mib', '')} | {r['seconds']:.2f} "
            f"| {slow[r['layers']] / r['seconds']:.1f}x | {moved} |"
        )
    return "\n".join(lines)
