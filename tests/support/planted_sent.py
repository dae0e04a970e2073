"""Faults of what the learner sends, and when: other tensors, stale ones, adapters merged in another way."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from pair import Pair
from rl.weights import digest
from trainer.learner.weights import LearnerWeights


@contextmanager
def sends(pair: Pair, change: Callable[[str, Any], Any], *, honest: bool = True) -> Iterator[None]:
    """Other tensors travel than the learner holds. `honest`: their digests are taken of what travels."""
    one, send, sending = LearnerWeights.__iter__, pair.send, []

    def weights(self: LearnerWeights) -> Iterator[tuple[str, Any]]:
        for name, tensor in one(self):
            other = change(name, tensor) if sending and self is pair.learner.weights else tensor
            if other is not tensor and self.digesting and honest:
                self.digests[name] = digest(other)
            yield name, other

    def begin(version: int) -> None:
        sending.append(True)
        try:
            send(version)
        finally:
            sending.clear()

    with patch.object(LearnerWeights, "__iter__", weights), patch.object(pair, "send", begin):
        yield


@contextmanager
def perturbed(pair: Pair, bit: int) -> Iterator[None]:
    """The learner's weights moved by 2^-bit since the engine got them."""
    pair.learner.perturb(bit)
    try:
        yield
    finally:
        pair.learner.perturb(bit)


@contextmanager
def stale(pair: Pair, bit: int) -> Iterator[None]:
    """The weights of before the last optimizer step are sent."""
    old = {name: tensor.clone() for name, tensor in pair.learner.weights}
    with perturbed(pair, bit), sends(pair, lambda name, tensor: old[name]):
        yield


@contextmanager
def published_too_early(pair: Pair, bit: int) -> Iterator[None]:
    """The weights are published, then the optimizer steps."""
    send, moved = pair.send, []

    def early(version: int) -> None:
        send(version)
        if not moved:
            pair.learner.perturb(bit)
            moved.append(bit)

    try:
        with patch.object(pair, "send", early):
            yield
    finally:
        for done in moved:
            pair.learner.perturb(done)


@contextmanager
def adapters_merged(pair: Pair, factor: float) -> Iterator[None]:
    """The adapters are merged with another factor when they are sent; 0 leaves them out, 2 merges them twice."""
    from trainer.model.lora import merged

    adapted = pair.learner.weights.adapted

    def change(name: str, tensor: Any) -> Any:
        layer = adapted.get(name)
        if layer is None:
            return tensor
        base = layer.base_layer.weight.detach()
        return (base.float() + factor * (merged(layer).float() - base.float())).to(base.dtype)

    with sends(pair, change):
        yield


@contextmanager
def adapters_scaled(pair: Pair, factor: float) -> Iterator[None]:
    """The trainer's forward pass has another alpha than what is merged and sent."""
    layers = list(pair.learner.weights.adapted.values())
    policy = pair.learner.parts.policy
    one = policy._hidden

    def hidden(*args: Any) -> Any:
        right = [dict(layer.scaling) for layer in layers]
        for layer in layers:
            layer.scaling = {name: value * factor for name, value in layer.scaling.items()}
        try:
            return one(*args)
        finally:
            for layer, scaling in zip(layers, right, strict=True):
                layer.scaling = scaling

    with patch.object(policy, "_hidden", hidden):
        yield
