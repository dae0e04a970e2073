"""Which tokens did the policy get, and which did it sample? The turns of one episode as a tree, and its rows.

A turn that continues the tokens of an earlier one is its child; a turn whose history was edited begins a new branch
where the tokens differ. Each path from the root to a leaf is one row. A sampled token that several rows share is
trained in the first of them only.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rl.types import Completion, Trajectory


@dataclass(eq=False)
class Node:
    """One sampled completion, and the tokens between it and what it continues."""

    parent: "Node | None"
    delta: list[int]
    """Tokens of the context that no earlier turn on this path holds."""
    completion: Completion
    turn: int
    length: int
    """Tokens of the path down to here, this completion included."""
    paid: float = 0.0
    """The reward of this turn."""
    children: list["Node"] = field(default_factory=list["Node"])

    def path(self) -> list["Node"]:
        """From the root down to here."""
        path, node = list["Node"](), self
        while node is not None:
            path.append(node)
            node = node.parent
        return path[::-1]


@dataclass
class Tree:
    """The turns of one episode, in the order in which they were sampled."""

    nodes: list[Node] = field(default_factory=list[Node])
    _roots: list[Node] = field(default_factory=list[Node])

    def add(self, context: list[int], completion: Completion, turn: int, after: Node | None = None) -> Node:
        """A turn that was sampled from exactly this context.

        It continues the turn with the longest path that the context begins with. `after` is that turn where it is
        known, which saves the search.
        """
        assert completion.token_ids, "an engine samples at least one token"
        parent = after or self.continued(context)
        return self.put(parent, context[0 if parent is None else parent.length :], completion, turn)

    def put(self, parent: Node | None, delta: list[int], completion: Completion, turn: int) -> Node:
        """A turn behind another one, with the tokens between them; None: at the beginning."""
        begin = 0 if parent is None else parent.length
        node = Node(parent, delta, completion, turn, begin + len(delta) + len(completion.token_ids))
        (self._roots if parent is None else parent.children).append(node)
        self.nodes.append(node)
        return node

    def drop(self, node: Node) -> None:
        """Take out a turn that no other one continues."""
        assert not node.children, "other turns continue it"
        (self._roots if node.parent is None else node.parent.children).remove(node)
        self.nodes.remove(node)

    def continued(self, context: list[int]) -> Node | None:
        """The turn with the longest path that a context begins with; None where it begins a new history."""
        best, open_ = None, [(root, 0) for root in self._roots]
        while open_:
            node, at = open_.pop()
            own = [*node.delta, *node.completion.token_ids]
            if context[at : at + len(own)] == own:
                if best is None or node.length > best.length:
                    best = node
                open_ += [(child, node.length) for child in node.children]
        return best

    def paths(self) -> list[list[Node]]:
        """The paths to all leaves, in the order in which the leaves were sampled."""
        return [node.path() for node in self.nodes if not node.children]

    def rows(self, *, group: int, episode: int, reward: float, **more: object) -> list[Trajectory]:
        """One trajectory for each path; `more` are further fields, which all rows share.

        What no turn was paid is paid at the last sampled token of the last row. A row that trains no token of its own
        cannot exist, because its leaf is in no other row.
        """
        paths = self.paths()
        rest = reward - sum(node.paid for node in self.nodes)
        # One row without rewards of its turns is paid at its end, as every single reply is.
        plain = len(paths) == 1 and not any(node.paid for node in self.nodes)
        seen: set[int] = set()
        rows: list[Trajectory] = []
        for row, path in enumerate(paths):
            columns = _Columns.of(path, seen)
            last = row == len(paths) - 1
            paid = None if plain else columns.paid(rest if last else 0.0)
            rows.append(
                Trajectory(
                    group=group,
                    episode=episode,
                    row=row,
                    token_ids=columns.token_ids,
                    mask=columns.mask,
                    logprobs=columns.logprobs,
                    versions=columns.versions,
                    reward=reward,
                    support=columns.support if path[0].completion.support is not None else None,
                    experts=_experts(path),
                    turns=columns.turns,
                    paid=paid,
                    engine=path[-1].completion.engine,
                    **more,  # pyright: ignore[reportArgumentType]
                )
            )
        return rows


def _experts(path: list[Node]) -> Tensor | None:
    """The experts of every token but the last of a path. Each turn reports those of its whole context, of which the
    earlier turns sampled some tokens; a token's own turn comes first."""
    parts: list[Tensor] = []
    known = 0
    for node in path:
        if node.completion.experts is None:
            return None
        parts.append(node.completion.experts[known:])
        known = node.length - 1
    return torch.cat(parts)


@dataclass
class _Columns:
    """The lists of a row while it grows."""

    token_ids: list[int] = field(default_factory=list[int])
    mask: list[bool] = field(default_factory=list[bool])
    logprobs: list[float] = field(default_factory=list[float])
    versions: list[int] = field(default_factory=list[int])
    support: list[list[int]] = field(default_factory=list[list[int]])
    turns: list[int] = field(default_factory=list[int])
    amounts: dict[int, float] = field(default_factory=dict[int, float])

    @classmethod
    def of(cls, path: list[Node], seen: set[int]) -> "_Columns":
        """The row of a path; `seen` are the turns that an earlier row trains, and grows."""
        columns = cls()
        for node in path:
            columns.given(node.delta)
            if id(node) in seen:
                columns.given(node.completion.token_ids)
                continue
            seen.add(id(node))
            columns.sampled(node)
        return columns

    def given(self, ids: list[int]) -> None:
        """Tokens that the policy read."""
        n = len(ids)
        self.token_ids += ids
        self.mask += [False] * n
        self.logprobs += [0.0] * n
        self.versions += [-1] * n
        self.support += ([] for _ in range(n))
        self.turns += [-1] * n

    def sampled(self, node: Node) -> None:
        """Tokens that the policy sampled."""
        c, n = node.completion, len(node.completion.token_ids)
        self.token_ids += c.token_ids
        self.mask += [True] * n
        self.logprobs += c.logprobs
        self.versions += c.versions
        self.support += c.support if c.support is not None else ([] for _ in range(n))
        self.turns += [node.turn] * n
        if node.paid:
            self.amounts[len(self.token_ids) - 1] = node.paid

    def paid(self, rest: float) -> tuple[tuple[int, float], ...]:
        """Where this row is paid; `rest` at its last sampled token."""
        if rest:
            last = max(i for i, sampled in enumerate(self.mask) if sampled)
            self.amounts[last] = self.amounts.get(last, 0.0) + rest
        return tuple(sorted(self.amounts.items()))
