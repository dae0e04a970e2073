"""Faults of loading, inside the engine's process: tensors that arrived, and became something else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from planted_body import head_of
from planted_worker import model_of, wrapped


@contextmanager
def loads(worker: Any, change: str, names: list[str]) -> Iterator[None]:
    """Tensors whose names end so are changed between arrival and the layers."""
    kind: Any = type(model_of(worker))
    load = kind.load_weights

    def faulty(self: Any, weights: Any) -> Any:
        found = list(weights)
        hit = [i for i, (name, _) in enumerate(found) if name.endswith(tuple(names))]
        tensors = [found[i][1] for i in hit]
        for i, tensor in zip(hit, CHANGES[change](tensors), strict=True):
            found[i] = (found[i][0], tensor)
        return load(self, found)

    with patch.object(kind, "load_weights", faulty):
        yield


def in_steps(tensor: Any, levels: int = 127) -> Any:
    """Quantised: whole numbers of steps, by rows."""
    step = tensor.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / levels
    return ((tensor.float() / step).round() * step).to(tensor.dtype)


CHANGES: dict[str, Any] = {
    "scaled": lambda ts: [t * 1.02 for t in ts],
    "bf16": lambda ts: [t.bfloat16().to(t.dtype) for t in ts],
    "transposed": lambda ts: [t.t().contiguous() for t in ts],
    "swapped": lambda ts: ts[::-1],
    "int8": lambda ts: [in_steps(t) if t.dim() == 2 else t for t in ts],
    "rows rolled": lambda ts: [t.roll(1, 0) for t in ts],
}


@contextmanager
def keeps_old(worker: Any, name: str) -> Iterator[None]:
    """One layer's tensors are left out of every commit: it keeps those that it has."""
    from rollout.weights.twin import Twin

    commit = Twin.commit

    def forgetful(self: Any) -> None:
        left_out = self.model.get_submodule(name)
        self.pairs = [pair for pair in self.pairs if pair[1] is not left_out]
        commit(self)

    with patch.object(Twin, "commit", forgetful):
        yield


@contextmanager
def keeps_old_head(worker: Any) -> Iterator[None]:
    """The cached copy of the head's weight outlives the update."""
    from rollout.head import packed

    head, model = head_of(worker), model_of(worker)
    # After a loss of its head, it is made from the weight of this moment.
    weight = model.lm_head.weight.detach()[: head.org_vocab_size]
    old = packed(weight.to(head.head_dtype or torch.float32, copy=True))

    def computed(one: Any, *args: Any, **kwargs: Any) -> Any:
        head.head = old
        return one(*args, **kwargs)

    with wrapped(head, "forward", computed):
        yield
