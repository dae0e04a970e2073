"""Does an engine hold the trainer's weights, and compute with them what the trainer computes?"""

from collections.abc import Callable, Iterator

from rl.parity.evidence import LayerError, WeightEvidence
from trainer.doctor.finding import Finding

LAYER_ERROR = {"float32": 1e-4, "bfloat16": 1.5e-2}
"""Largest relative error of a layer, on equal input, at which its weights count as equal. Clean runs show 1e-6 and
5e-3."""


def weights(w: WeightEvidence, dtype: str) -> Iterator[Finding]:
    """Tensors and layers that differ."""
    where = f"engine {w.engine}"

    def fault(cause: str, evidence: str) -> Finding:
        return Finding(cause=cause, severity="fault", where=where, evidence=evidence)

    moved = [name for name, digest in w.live.items() if w.sent.get(name) != digest]
    if len(moved) > len(w.live) / 2:
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
    if not moved:
        yield from _layers(w.layers, dtype, fault)


def _layers(layers: list[LayerError], dtype: str, fault: Callable[[str, str], Finding]) -> Iterator[Finding]:
    limit = LAYER_ERROR[dtype]
    bad = [layer for layer in layers if not layer.error <= limit]
    if not bad:
        return
    matrices = [layer for layer in bad if layer.kind != "norm"]
    first = bad[0]
    text = f"on equal input, the output of {first.name!r} differs by {first.error:.1e} of its size (limit {limit:g})"
    if [layer.kind for layer in bad] == ["head"] and first.bf16_error < 0.3 * first.error:
        yield fault(
            "head_dtype",
            f"every layer agrees but the lm_head, which differs by {first.error:.1e} (in bf16 {first.bf16_error:.1e})",
        )
    elif [layer.kind for layer in bad] == ["head"]:
        yield fault("tied_head", f"every layer agrees but the lm_head, which differs by {first.error:.1e}")
    elif len(matrices) > 0.5 * sum(layer.kind != "norm" for layer in layers):
        yield fault("stale_weights", f"{len(bad)} of {len(layers)} layers differ; {text}")
    elif not matrices and all(layer.bf16_error < 0.3 * layer.error for layer in bad):
        yield fault("norm_dtype", f"{text}; it agrees once its weight is rounded to bf16")
    elif abs(first.scale - 1) > 2e-3 and first.scaled_error < 0.2 * first.error:
        yield fault("tensor_differs", f"{text}; it equals the trainer's times {first.scale:.4g}")
    else:
        yield fault("tensor_not_synced", f"{text}; {len(bad)} of {len(layers)} layers hold other values")
