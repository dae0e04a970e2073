"""Does an engine hold the trainer's weights, and compute with them what the trainer computes?"""

from collections.abc import Iterator

from rl.parity.evidence import Evidence, WeightEvidence
from trainer.doctor.body import body, shared_fit
from trainer.doctor.finding import Finding, faults_of


def weights(w: WeightEvidence, e: Evidence) -> Iterator[Finding]:
    """Tensors and layers that differ."""
    fault = faults_of(f"engine {w.engine}")
    moved = [name for name, digest in w.live.items() if w.sent.get(name) != digest]
    if len(moved) > len(w.live) / 2 and (shared := shared_fit(w, e)):
        cause, text = shared
        sent = f"{len(moved)} of {len(w.live)} tensors were sent with other values than the trainer's"
        yield fault(cause, f"{sent}: {text}")
    elif len(moved) > len(w.live) / 2:
        yield fault(
            "stale_weights",
            f"{len(moved)} of {len(w.live)} tensors sent as version {w.version} are not the "
            f"trainer's current ones, first {moved[0]!r}",
        )
    elif moved:
        yield fault("tensor_differs", f"{moved[0]!r} was sent with other values than the trainer has")
    for received in w.received:
        lost = [name for name in w.sent if name not in received]
        changed = [name for name in w.sent if name in received and received[name] != w.sent[name]]
        if lost:
            yield fault("tensor_not_synced", f"{lost[0]!r} never arrived ({len(lost)} of {len(w.sent)} tensors)")
        if changed:
            yield fault("tensor_differs", f"{changed[0]!r} arrived with other bits than the trainer sent")
    if w.cached_after_update:
        yield fault(
            "stale_prefix",
            f"after the update to version {w.version}, {w.cached_after_update} prompt tokens came from the KV of older "
            f"weights",
        )
    intact = not moved and all(
        received.get(name) == digest for received in w.received for name, digest in w.sent.items()
    )
    named = body(w, e) if intact else None
    change = w.changes
    if change and change.remembers and not (named and named[0] == "kv_cache"):
        yield fault(
            "kv_cache",
            f"asked twice for the same prompt, attention computes something else from {change} on, with equal queries, "
            "keys and values: it reads what other requests left",
        )
    elif change and (named is None or named[0] != "kv_cache"):  # a cache that keeps old values changes too
        yield fault("mode", f"asked twice for the same prompt, the engine computes something else from {change} on")
    elif named:
        yield fault(*named)
