"""How do several rewards become one, and how is a whole group judged at once?"""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rl.rewards.result import NOT_APPLICABLE, Part, Score, Scored, points, rows_of
from rl.typed import Checked
from rl.types import Reply

OneReply = Callable[[Reply], Score | Awaitable[Score]]
AllReplies = Callable[[list[Reply]], Sequence[Score] | Awaitable[Sequence[Score]]]


@dataclass(frozen=True)
class OverGroup(Checked):
    """A reward that sees all replies to a prompt together, such as a judge that ranks them.

    The judge gets the list of replies and returns one score for each, in the same order. It may be `async`. It is
    called once per group, so `deadlines.reward_s` is for the whole group.
    """

    judge: AllReplies

    def __call__(self, replies: list[Reply]) -> Any:
        return self.judge(replies)


Member = OneReply | OverGroup


@dataclass(frozen=True)
class Weighted(Checked):
    """Several rewards by name, as a weighted sum: `Weighted({"right": right, "short": (short, 0.2)})`.

    A reward without a number has the weight 1. Each is logged by itself and without its weight, as
    `reward/<name>/mean`. A reward that returns NOT_APPLICABLE is left out of the sum; where none applies, the whole
    does not. With an `OverGroup` among them all are computed in one call per group.
    """

    rewards: Mapping[str, Member | tuple[Member, float]]

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("Weighted has no reward: write Weighted({'right': right, 'short': (short, 0.2)})")
        if endless := [name for name, (_, weight) in self.members.items() if not math.isfinite(weight)]:
            raise ValueError(f"Weighted: the weight of {endless[0]!r} is not finite")

    @classmethod
    def right_form(cls, field: str, value: Any) -> str | None:
        """How to write the rewards."""
        return "must be rewards by name, with a weight or without: write {'right': right, 'short': (short, 0.2)}"

    @property
    def members(self) -> dict[str, tuple[Member, float]]:
        """Each reward and its weight."""
        return {name: m if isinstance(m, tuple) else (m, 1.0) for name, m in self.rewards.items()}

    @property
    def over_group(self) -> bool:
        """Whether one of them sees the whole group."""
        return any(judges_groups(member) for member, _ in self.members.values())

    def __call__(self, asked: Any) -> Any:
        """The score of one reply; with an `OverGroup` among the rewards those of a list of replies."""
        replies: list[Reply] = asked if self.over_group else [asked]
        answers: dict[str, Any] = {}
        try:
            for name, (member, _) in self.members.items():
                with _named(name):
                    whole: Any = member
                    answers[name] = whole(replies) if judges_groups(member) else [whole(reply) for reply in replies]
        except BaseException:
            _close(answers.values())
            raise
        if any(map(inspect.isawaitable, _flat(answers.values()))):
            return self._later(answers, replies)
        return self._summed(answers, replies)

    async def _later(self, answers: dict[str, Any], replies: list[Reply]) -> Any:
        async def whole(name: str, answer: Any) -> Any:
            with _named(name):
                if inspect.isawaitable(answer):
                    return await answer
                return await asyncio.gather(*map(_settled, answer)) if isinstance(answer, list) else answer

        came = await asyncio.gather(*(whole(name, answer) for name, answer in answers.items()))
        return self._summed(dict(zip(answers, came, strict=True)), replies)

    def _summed(self, answers: dict[str, Any], replies: list[Reply]) -> Any:
        columns: dict[str, list[Any]] = {}
        for name, answer in answers.items():
            with _named(name):
                columns[name] = rows_of(answer, len(replies))
        sums = [self._sum({name: column[i] for name, column in columns.items()}) for i in range(len(replies))]
        return sums if self.over_group else sums[0]

    def _sum(self, results: dict[str, Any]) -> Scored:
        total, applies, parts = 0.0, False, dict[str, Part]()
        for name, (_, weight) in self.members.items():
            with _named(name):
                reward, inner = points(results[name])
            if reward is None:
                continue
            applies, total = True, total + weight * reward
            parts |= {name: reward} | {f"{name}/{part}": value for part, value in inner.items()}
        return Scored(reward=total if applies else NOT_APPLICABLE, parts=parts)


def judges_groups(reward: object) -> bool:
    """Whether a reward takes a list of replies."""
    return isinstance(reward, OverGroup) or (isinstance(reward, Weighted) and reward.over_group)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Add the reward's name to an error."""
    try:
        yield
    except Exception as error:  # raised again, whatever the user's function raised
        error.add_note(f"in the reward {name!r}")
        raise


async def _settled(answer: Any) -> Any:
    return await answer if inspect.isawaitable(answer) else answer


def _flat(answers: Iterable[Any]) -> list[Any]:
    """Every answer by itself, where some rewards gave one for each reply."""
    return [one for answer in answers for one in (answer if isinstance(answer, list) else [answer])]


def _close(answers: Iterable[Any]) -> None:
    """End coroutines that nobody will await; Python would warn about them."""
    for answer in _flat(answers):
        if inspect.iscoroutine(answer):
            answer.close()
