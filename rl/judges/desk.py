"""How is a judge asked? One place for concurrency, retries, deadlines and the cache, whoever asks.

All judges work on one event loop of their own: rewards, environments and evaluations have others, and a judge's bound
holds for all of them together.
"""

import asyncio
import hashlib
import json
import random
import time
from asyncio import sleep
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from rl.data import Given
from rl.judges.hearing import JudgeError, current
from rl.judges.loops import awaited_on
from rl.typed import Checked, shortened
from rl.types import Verdict

MOST_KNOWN = 100_000
"""Verdicts that a cache holds; the oldest go first."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 20.0
"""Before the second try, doubled for each further one, and at most."""
_RANDOM = random.Random()
"""Of its own: nobody else's draws may depend on a judge's failures."""


@dataclass(frozen=True, kw_only=True)
class Calls(Checked):
    """How a judge is asked."""

    concurrency: int = 32
    """Calls at the same time."""
    tries: int = 5
    """Tries of one call. Tried again: HTTP 408, 409, 429 and 5xx, an answer that does not come, and one that cannot be
    read. The wait doubles each time, with jitter, and is at least the server's Retry-After."""
    try_s: float = 60.0
    """Seconds of one try."""
    seconds: float = 300.0
    """Seconds of one call with all of its tries, from when it is among the `concurrency` that run."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "tries", "try_s", "seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"calls.{name}={getattr(self, name):g} must be above 0")


class TryAgain(Exception):
    """A try failed, and another may not. `after`: seconds that the server asks to wait."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class Desk:
    """Asks one judge, which has `calls`, a `label`, a name `shown` in errors, and `ask(prompt, reply)` for one try that
    raises TryAgain or JudgeError. `repeatable`: it gives one verdict for one question, which may then be kept."""

    def __init__(self, judge: Any) -> None:
        self.judge, self.tally = judge, Counter[str]()
        self.slots = asyncio.Semaphore(judge.calls.concurrency)
        self.known: OrderedDict[str, asyncio.Task[Verdict]] = OrderedDict()

    async def verdict(self, prompt: Given, reply: str) -> Verdict:
        """From the cache, or from the judge; equal questions that are asked at the same time are one call."""
        self.tally["calls"] += 1
        if not self.judge.repeatable:
            return await self._asked(prompt, reply)
        key = hashlib.sha256(json.dumps([self.judge.label, prompt, reply], default=str).encode()).hexdigest()
        task = self.known.get(key)
        self.tally["cached"] += task is not None
        if task is None:
            task = self.known[key] = asyncio.create_task(self._asked(prompt, reply))
            task.add_done_callback(partial(self._forget_failed, key))
            if len(self.known) > MOST_KNOWN:
                self.known.popitem(last=False)
        return await asyncio.shield(task)

    def _forget_failed(self, key: str, task: asyncio.Task[Verdict]) -> None:
        if task.cancelled() or task.exception():
            self.known.pop(key, None)

    async def _asked(self, prompt: Given, reply: str) -> Verdict:
        async with self.slots:
            began = time.monotonic()
            try:
                return await self._tried(prompt, reply, began + self.judge.calls.seconds)
            except JudgeError:
                self.tally["failed"] += 1
                raise
            finally:
                self.tally["seconds"] += time.monotonic() - began  # pyright: ignore[reportArgumentType]

    async def _tried(self, prompt: Given, reply: str, end: float) -> Verdict:
        calls, tries, why = self.judge.calls, 0, ""
        while tries < calls.tries:
            tries += 1
            self.tally["tries"] += 1
            wait = _RANDOM.uniform(0.5, 1.0) * min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (tries - 1))
            try:
                async with asyncio.timeout(min(calls.try_s, end - time.monotonic())):
                    return await self.judge.ask(prompt, reply)
            except TimeoutError:
                why = f"no answer within {calls.try_s:g} s, or within what was left of calls.seconds"
            except TryAgain as error:
                why, wait = str(error), wait + error.after
            if time.monotonic() + wait > end:
                break
            if tries < calls.tries:
                await sleep(wait)
        raise JudgeError(
            f"the judge {self.judge.shown} failed {tries} times (calls.tries={calls.tries}, calls.seconds="
            f"{calls.seconds:g}). The last time: {shortened(why, 300)}"
        )


_DESKS: WeakKeyDictionary[Any, Desk] = WeakKeyDictionary()
"""By judge. Kept apart from it, because a judge may travel to other processes and has settings alone."""


async def asked(judge: Any, prompt: Given, reply: str) -> float:
    """The score of a reply to a prompt; the verdict is heard by who called the user's code. Raises JudgeError."""
    hearing = current()
    with hearing.waiting():
        verdict = await asyncio.wrap_future(awaited_on("judges", _at_its_desk(judge, prompt, reply)))
    hearing.verdicts.append(verdict)
    return verdict.score


async def _at_its_desk(judge: Any, prompt: Given, reply: str) -> Verdict:
    if judge not in _DESKS:
        _DESKS[judge] = Desk(judge)
    return await _DESKS[judge].verdict(prompt, reply)


def judge_metrics(judges: Iterable[Any]) -> dict[str, float]:
    """What happened at each judge since the last time this was asked for; nothing of one that was not asked."""
    metrics: dict[str, float] = {}
    for judge in judges:
        if not (desk := _DESKS.get(judge)) or not desk.tally["calls"]:
            continue
        tally, desk.tally, name = desk.tally, Counter[str](), judge.label
        metrics |= {
            f"judge/{name}/calls": float(tally["calls"]),
            f"judge/{name}/cached_frac": tally["cached"] / tally["calls"],
            f"judge/{name}/failed": float(tally["failed"]),
        }
        if made := tally["calls"] - tally["cached"]:
            metrics |= {f"judge/{name}/tries": tally["tries"] / made, f"judge/{name}/seconds": tally["seconds"] / made}
    return metrics
