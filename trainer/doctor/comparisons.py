"""How far is an engine from itself and from the trainer, when one condition changes at a time?"""

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from rl.batch import collate, trajectory
from rl.parity.gap import Gap, gap
from rl.types import Batch, Completion
from trainer.doctor.examine import Examiner
from trainer.doctor.finding import Finding
from trainer.doctor.numbers import MEAN_GAP

PERTURBED_BIT = 6
"""An in-flight update changes half of the weights by 2^-6: enough to show, too little to produce garbage."""
LONG_S = 1.5
"""About how many seconds sequences run, so that an update meets them; at least 48 tokens, at most the context."""
SAMPLES = 2
"""Of each prompt."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One condition and its gap; `gap` is None where the condition could not be tried."""

    name: str
    gap: Gap | None
    note: str = ""
    held: bool = True
    """Whether the two sides must agree here to the limit of the run's dtype."""


class Comparisons:
    """All comparisons that need no other engine. They ask engine 0."""

    def __init__(self, examiner: Examiner) -> None:
        self.examiner, self.cluster = examiner, examiner.cluster
        self.prompts = examiner.prompts
        self.findings: list[Finding] = []
        self.token_s = 0.0
        """Seconds that the engine takes for one token of each sequence."""

    async def run_all(self, version: int) -> list[Comparison]:
        """Make all comparisons; the engines hold `version` before, and a perturbed `version + 1` after."""
        began = time.perf_counter()
        first = await self._sample()
        longest = max(len(c.token_ids) for group in first for c in group)
        self.token_s = (time.perf_counter() - began) / longest
        again, alone = await self._sample(), await self._sample(alone=True)
        comparisons = [
            between("the same engine, asked twice", first, again),
            between("one prompt at a time | all at once", alone, first),
            await self._cached(),
            await self._prefill(),
            *await self._routing(),
            *await self._in_flight(version),
        ]
        limit = MEAN_GAP[self.examiner.config.dtype]
        for one in comparisons:
            if one.held and one.gap and not one.gap.mean_abs <= limit:
                text = f"mean |d| {one.gap.mean_abs:.1e} nats (limit {limit:g}), max {one.gap.max_abs:.1e}"
                self.findings.append(Finding(cause="condition", severity="fault", where=one.name, evidence=text))
        return comparisons

    async def _sample(self, *, alone: bool = False, **options: Any) -> list[list[Completion]]:
        """A few samples of each prompt, all prompts at once or one after the other; the same seeds at every call."""
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
        deadline = self.examiner.config.deadlines.sample_s
        limit = max_tokens or self.examiner.max_tokens
        return await self.cluster.ask_engine(
            0, lambda e: e.sample(token_ids, n, seed, temperature, limit, fresh), deadline_s=deadline
        )

    async def _cached(self) -> Comparison:
        name = "prefix cache hit | miss"
        if not self.examiner.config.rollout.prefix_cache:
            return Comparison(name=name, gap=None, note="the prefix cache is off")
        prompt = self.examiner.long_prompt()
        missed = await self._ask(prompt, 4, 23, fresh=True)
        hit = await self._ask(prompt, 4, 23)
        cached = min(c.cached_prompt_tokens for c in hit)
        compared = between(name, [hit], [missed])
        note = f"{cached} of {len(prompt)} prompt tokens from the cache. {compared.note}"
        return Comparison(name=name, gap=compared.gap, note=note)

    async def _prefill(self) -> Comparison:
        """Decode against prefill. Both at T = 1 and untruncated: vLLM scores prompts in no other way."""
        name, config = "decode | prefill, at T = 1", self.examiner.config
        r = config.rollout
        if r.truncation or r.min_tokens or r.bad_words:
            note = "vLLM scores prompts without the run's truncation, min_tokens and bad words"
            return Comparison(name=name, gap=None, note=note)
        groups = await self._sample(temperature=1.0)
        deadline = config.deadlines.sample_s

        async def prefilled(token_ids: list[int], c: Completion) -> Completion:
            scores = await self.cluster.ask_engine(
                0, lambda e: e.prefill(token_ids, [*c.token_ids]), deadline_s=deadline
            )
            return replace(c, logprobs=scores)

        again = [
            list(await asyncio.gather(*(prefilled(p.token_ids, c) for c in group)))
            for p, group in zip(self.prompts, groups, strict=True)
        ]
        return between(name, groups, again)

    async def _routing(self) -> list[Comparison]:
        """The trainer with the engine's experts, and with those that its own routers choose."""
        batch = self._batch(await self._sample())
        if batch.experts is None:
            return []
        own, counts = (await self.cluster.ask_learners(lambda rank: rank.own_routing(batch)))[0]
        note = "{} of {} tokens, {} of {} choices are other experts".format(*counts)
        return [
            against("rollout | trainer with the engine's experts", await self._trainer(batch), batch, batch.mask),
            against("rollout | trainer with its own experts", own, batch, batch.mask, note, held=False),
        ]

    async def _in_flight(self, version: int) -> list[Comparison]:
        """New weights reach the engine while it samples: its tokens before, after, and after over the old KV."""
        config = self.examiner.config
        new, room = version + 1, config.rollout.max_model_len - max(len(p.token_ids) for p in self.prompts)
        length = min(max(48, math.ceil(LONG_S / self.token_s)), room)
        was_aborted = await self._aborted()
        await self.cluster.ask_learners(lambda rank: rank.perturb(PERTURBED_BIT))
        sent = asyncio.Event()

        async def keep_sampling() -> list[list[Completion]]:
            # How long a batch takes is not known well: sample repeatedly. The last two batches span the update.
            batches: deque[list[list[Completion]]] = deque(maxlen=2)
            while not (batches and sent.is_set()):
                batches.append(await self._sample(max_tokens=length))
            return [list(chain(*groups)) for groups in zip(*batches, strict=True)]

        running = asyncio.create_task(keep_sampling())
        await asyncio.sleep(0.3 * length * self.token_s)
        try:
            await self.examiner.learner.send(new, digesting=False)
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
        note = f"{int(across.sum())} of {len(across)} sequences were in flight, {aborted} aborted"
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


def between(name: str, one: list[list[Completion]], other: list[list[Completion]]) -> Comparison:
    """Two answers to the same questions, compared on the tokens before they first differ."""
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    same = [_common(a.token_ids, b.token_ids) for a, b in pairs]
    whole = sum(n == len(a.token_ids) == len(b.token_ids) for n, (a, b) in zip(same, pairs, strict=True))
    width = max(same)
    note = f"{whole} of {len(pairs)} sequences have the same tokens"
    if not width:
        return Comparison(name=name, gap=None, note=note)
    mask = torch.tensor([[t < n for t in range(width)] for n in same])
    left, right = (
        torch.tensor([[*pair[i].logprobs[:n], *[0.0] * (width - n)] for pair, n in zip(pairs, same, strict=True)])
        for i in (0, 1)
    )
    return Comparison(name=name, gap=gap(left, right, mask), note=note)


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def against(
    name: str, trainer: torch.Tensor, batch: Batch, mask: torch.Tensor, note: str = "", held: bool = True
) -> Comparison:
    """An engine's samples against the trainer, on the tokens in `mask`."""
    mask = mask & batch.mask
    if not mask.any():
        return Comparison(name=name, gap=None, note="no sequence was in flight when the update came")
    return Comparison(name=name, gap=gap(trainer, batch.rollout_logprobs, mask), note=note, held=held)
