"""What a sender of weights is given, and what it does."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from rl.weights import TensorMeta


class Weights(Protocol):
    """The learner's weights: names first, then full tensors in that order (a collective call over its ranks)."""

    def metadata(self) -> list[TensorMeta]: ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


class Sender(Protocol):
    """Sends the learner's current weights to every engine, as `client.version`; called on every rank."""

    def send_weights(self) -> None: ...

    def close(self) -> None:
        """Leave the channel; another sender takes its place."""
        ...
