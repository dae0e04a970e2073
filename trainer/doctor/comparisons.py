"""The numerics ladder: how far an engine is from itself and from the trainer, one circumstance at a time."""

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from rl.batch import collate, trajectory
from rl.parity.gap import Gap, gap
from rl.types import Batch, Completion
from trainer.doctor.diagnosis import MEAN_GAP, Finding
from trainer.doctor.examine import Patient

PERTURBED_BIT = 6
"""An in-flight update brings changes of 2^-6 of half the weights: it must show, and must not make garbage."""
LONG_S = 1.5
"""About how long, in seconds, sequences run for an update to meet them; at least 48 tokens, at most the context."""
SAMPLES = 2
"""Of each prompt."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One circumstance, and the gap in it; `gap` is None where it could not be tried."""

    name: str
    gap: Gap | None
    note: str = ""
    held: bool = True
    """Whether the two sides must agree here to the fp32 limit."""


class Ladder:
    """The rungs that need no other engine. Engine 0 is asked."""

    def __init__(self, patient: Patient) -> None:
        self.patient, self.cluster = patient, patient.cluster
        self.prompts = patient.prompts
        self.findings: list[Finding] = []
        self.token_s = 0.0
        """Seconds that the engine takes for one token of each sequence."""

    async def climb(self, version: int) -> list[Rung]:
        """All rungs; the engines hold `version` before, and a disturbed `version + 1` after."""
        began = time.perf_counter()
        first = await self._sample()
        longest = max(len(c.token_ids) for group in first for c in group)
        self.token_s = (time.perf_counter() - began) / longest
        again, alone = await self._sample(), await self._sample(alone=True)
        rungs = [
            between("the same engine, asked twice", first, again),
            between("one prompt at a time | all at once", alone, first),
            await self._cached(),
            await self._prefill(),
            *await self._in_flight(version),
        ]
        limit = MEAN_GAP[self.patient.config.dtype]
        for rung in rungs:
            if rung.held and rung.gap and not rung.gap.mean_abs <= limit:
                text = f"mean |d| {rung.gap.mean_abs:.1e} nats (limit {limit:g}), max {rung.gap.max_abs:.1e}"
                self.findings.append(Finding(cause="circumstance", severity="fault", where=rung.name, evidence=text))
        return rungs

    async def _sample(self, *, alone: bool = False, **options: Any) -> list[list[Completion]]:
        """A few samples of each prompt, all at once or one prompt after the other; the same seeds at every call."""
        asked = (self._ask(p.token_ids, SAMPLES, 17 + 1000 * p.ordinal, **options) for p in self.prompts)
        return [await one for one in asked] if alone else list(await asyncio.gather(*asked))

    async def _ask(
        self,
        token_ids: list[int],
        n: int,
        seed: int,
        temperature: float | None = None,
        max_tokens: int | None = None,
        fresh: bool = False,
    ) -> list[Completion]:
        deadline = self.patient.config.deadlines.sample_s
        limit = max_tokens or self.patient.max_tokens
        return await self.cluster.ask_engine(
            0, lambda e: e.sample(token_ids, n, seed, temperature, limit, fresh), deadline_s=deadline
        )

    async def _cached(self) -> Rung:
        name = "prefix cache hit | miss"
        if not self.patient.config.rollout.prefix_cache:
            return Rung(name=name, gap=None, note="the prefix cache is off")
        prompt = self.patient.long_prompt()
        missed = await self._ask(prompt, 4, 23, fresh=True)
        hit = await self._ask(prompt, 4, 23)
        cached = min(c.cached_prompt_tokens for c in hit)
        rung = between(name, [hit], [missed])
        return Rung(
            name=name, gap=rung.gap, note=f"{cached} of {len(prompt)} prompt tokens from the cache. {rung.note}"
        )

    async def _prefill(self) -> Rung:
        """Both at T = 1 and untruncated, for vLLM scores prompts in no other way."""
        name, config = "decode | prefill, at T = 1", self.patient.config
        if config.rollout.truncation:
            return Rung(name=name, gap=None, note="vLLM scores prompts without the run's truncation")
        groups = await self._sample(temperature=1.0)
        deadline = config.deadlines.sample_s

        async def prefilled(token_ids: list[int], c: Completion) -> Completion:
            said = await self.cluster.ask_engine(0, lambda e: e.prefill(token_ids, c.token_ids), deadline_s=deadline)
            return Completion(token_ids=c.token_ids, logprobs=said, versions=c.versions, finish_reason=c.finish_reason)

        again = [
            list(await asyncio.gather(*(prefilled(p.token_ids, c) for c in group)))
            for p, group in zip(self.prompts, groups, strict=True)
        ]
        return between(name, groups, again)

    async def _in_flight(self, version: int) -> list[Rung]:
        """New weights reach the engine while it samples: what was said before, after, and over the old KV."""
        new, room = version + 1, self.patient.config.rollout.max_model_len - max(len(p.token_ids) for p in self.prompts)
        length = min(max(48, math.ceil(LONG_S / self.token_s)), room)
        was_aborted = await self._aborted()
        await self.cluster.ask_learners(lambda rank: rank.perturb(PERTURBED_BIT))
        sent = asyncio.Event()

        async def keep_sampling() -> list[list[Completion]]:
            # Lot after lot, for how long one takes is not known well; the last two are around the update.
            lots: deque[list[list[Completion]]] = deque(maxlen=2)
            while not (lots and sent.is_set()):
                lots.append(await self._sample(max_tokens=length))
            return [list(chain(*groups)) for groups in zip(*lots, strict=True)]

        running = asyncio.create_task(keep_sampling())
        await asyncio.sleep(0.3 * length * self.token_s)
        try:
            await self.patient.learner.send(new, digesting=False)
        finally:
            sent.set()
        batch = self._batch(await running)
        fresh = self._batch(await self._sample())
        after, afresh = await self._trainer(batch), await self._trainer(fresh)
        await self.cluster.ask_learners(lambda rank: rank.perturb(PERTURBED_BIT))
        before = await self._trainer(batch)
        across = ((batch.versions == version).any(1) & (batch.versions == new).any(1))[:, None]
        aborted = await self._aborted() - was_aborted
        if aborted:
            text = f"{aborted} requests were aborted by an update"
            self.findings.append(Finding(cause="aborted", severity="fault", where="engine 0", evidence=text))
        note = f"{int(across.sum())} of {len(across)} sequences were under way, {aborted} aborted"
        old_part, new_part = batch.versions == version, (batch.versions == new) & across
        return [
            against("in flight: before the update | trainer's old weights", before, batch, old_part, note),
            against("in flight: after it, over the KV that was kept | new weights", after, batch, new_part, held=False),
            against("in flight: begun after it | trainer's new weights", afresh, fresh, fresh.mask),
        ]

    async def _aborted(self) -> int:
        return sum(c["aborted"] for c in await self.cluster.ask_engines(lambda e: e.counters()))

    def _batch(self, groups: list[list[Completion]]) -> Batch:
        pairs = zip(self.prompts, groups, strict=True)
        return collate([trajectory(p, c, 0.0, {}) for p, group in pairs for c in group])

    async def _trainer(self, batch: Batch) -> torch.Tensor:
        return (await self.cluster.ask_learners(lambda rank: rank.logprobs(batch)))[0]


def between(name: str, one: list[list[Completion]], other: list[list[Completion]]) -> Rung:
    """Two answers to the same questions, compared as far as their tokens agree."""
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    same = [_common(a.token_ids, b.token_ids) for a, b in pairs]
    whole = sum(n == len(a.token_ids) == len(b.token_ids) for n, (a, b) in zip(same, pairs, strict=True))
    width = max(same)
    note = f"{whole} of {len(pairs)} sequences have the same tokens"
    if not width:
        return Rung(name=name, gap=None, note=note)
    mask = torch.tensor([[t < n for t in range(width)] for n in same])
    left, right = (
        torch.tensor([[*pair[i].logprobs[:n], *[0.0] * (width - n)] for pair, n in zip(pairs, same, strict=True)])
        for i in (0, 1)
    )
    return Rung(name=name, gap=gap(left, right, mask), note=note)


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def against(
    name: str, trainer: torch.Tensor, batch: Batch, mask: torch.Tensor, note: str = "", held: bool = True
) -> Rung:
    """An engine's samples against the trainer on a part of their tokens."""
    mask = mask & batch.mask
    if not mask.any():
        return Rung(name=name, gap=None, note="no sequence was under way when the update came")
    return Rung(name=name, gap=gap(trainer, batch.rollout_logprobs, mask), note=note, held=held)
