"""What is kept of an agent's episode, and what it is opened with? Both travel between the driver and an engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rl.environments.tree import Node, Tree
from rl.types import Completion

Limit = Literal["turns", "length"]
"""Which limit of tokens or turns a request was refused for; the word of `rl.environments.types.Ended`."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """An episode that an engine serves from now on."""

    secret: str
    """Part of its address."""
    seed: tuple[int, int, int]
    """The run's seed, the prompt's ordinal, and which of the group's episodes it is."""
    turns: int
    tokens: int | None
    """Most requests, and most sampled tokens."""
    temperature: float | None = None
    """None: the run's."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One completion in the tree of an episode."""

    parent: int | None
    """Which of the record's completions it continues."""
    delta: list[int]
    """The tokens between the end of its parent and its own first token."""
    completion: Completion
    turn: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """An episode that has ended."""

    sampled: Sequence[Sampled] = ()
    """What is trained on; a parent comes before its children."""
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])
    """Sampled tokens that nobody got, by reason; they are not trained on."""
    branches: Mapping[str, int] = field(default_factory=dict[str, int])
    """Requests that did not go on from an earlier reply, by reason."""
    refused: Mapping[str, int] = field(default_factory=dict[str, int])
    """Requests that were refused, by the setting that they asked for or the limit that they met."""
    limit: Limit | None = None
    """The first limit that a request was refused for."""
    lost: str = ""
    """Why the engine could not answer a request; empty if it answered all."""

    def tree(self) -> Tree:
        """The turns as a tree, which gives the rows."""
        tree, nodes = Tree(), list[Node]()
        for each in self.sampled:
            parent = None if each.parent is None else nodes[each.parent]
            nodes.append(tree.put(parent, each.delta, each.completion, each.turn))
        return tree


def sampled_of(nodes: Sequence[Node]) -> list[Sampled]:
    """Nodes of a tree as they travel. The parent of each must be among those before it."""
    index = {id(node): i for i, node in enumerate(nodes)}
    return [
        Sampled(
            parent=None if node.parent is None else index[id(node.parent)],
            delta=node.delta,
            completion=node.completion,
            turn=node.turn,
        )
        for node in nodes
    ]
