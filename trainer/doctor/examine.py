"""Are the engines' log-probabilities what the loss expects? Collects evidence for `trainer.doctor.diagnosis`."""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from rl.batch import collate, integers, trajectory
from rl.loop.stream import sample_seed
from rl.parity.architecture import architecture
from rl.parity.body.fits import LAYER_ERROR
from rl.parity.body.repeat import first_change
from rl.parity.evidence import Evidence, SampleEvidence, SamplerEvidence, WeightEvidence
from rl.parity.gap import Gap, NoiseClip, clipped_by_noise, finite_part, gap, surprise
from rl.sampling.forbidden import Forbidden
from rl.tokens import encode
from rl.types import Batch, Completion, Prompt, Trajectory
from trainer.cluster.cluster import Cluster
from trainer.cluster.remote import Asked, RemoteLearner
from trainer.doctor.body import size
from trainer.doctor.check import ParityCheck
from trainer.doctor.diagnosis import diagnose
from trainer.doctor.finding import ParityError
from trainer.doctor.numbers import agrees, limit_of
from trainer.doctor.sampler import sampler_evidence
from trainer.model.files import model_config
from trainer.model.forbidden import forbidden
from trainer.prompts import Prepared

PROMPTS = 8
TOKENS, SHORT = 300, 48
"""About how many sampled tokens a check looks at, and how many a reply has at most."""
TRACED_TOKENS = 24
"""Long enough that positions, windows and the order of tokens matter."""
TRACED_REPLIES, TRACED_REPLY = 2, 16
"""Replies whose logits are looked at, and their tokens."""
Trace = list[dict[str, Any]]
"""Traced layers of one engine, by worker."""


class Examiner:
    """Examines a cluster whose engines hold no weights yet, on prompts of its run.

    `first` are those with which the run begins: where its replies are short and one engine samples them, the samples
    are its first groups.
    """

    def __init__(
        self, cluster: Cluster, learner: RemoteLearner, prepared: Prepared, seed: int = 0, first: Sequence[Prompt] = ()
    ) -> None:
        self.cluster, self.learner, self.prepared, self.seed = cluster, learner, prepared, seed
        self.config = cluster.config
        self.forbidden = forbidden(self.config, self.config.model, prepared.tokenizer)
        train, count = prepared.train, min(PROMPTS, len(prepared.train))
        self.prompts = [replace(train[i * len(train) // count], ordinal=i) for i in range(count)]
        self.max_tokens = min(self.config.rollout.max_tokens, SHORT)
        self.groups: dict[Asked, list[Completion]] = {}
        """What the last engine sampled, by request."""
        self.looks = self.n = self._enough(self.prompts)
        """Replies of each prompt that are looked at, and that are sampled."""
        fits = len(cluster.engines) == 1 and self.config.rollout.max_tokens <= SHORT
        self.begins = bool(first) and fits and self._enough(first) <= self.config.group_size
        if self.begins:
            self.prompts, self.looks, self.n = [*first], self._enough(first), self.config.group_size

    async def examine(self, version: int) -> ParityCheck:
        """Publish the learner's weights as `version`; then check the engines' settings, weights and samples."""
        began = time.perf_counter()
        facts, mine, driver = await self._facts()
        weights, traces = await self._weights(version, self.long_prompt(4 * max(one["block_size"] for one in facts)))
        # The engines sample while the learner runs its layers on what they traced.
        asked = await self._requests()
        sampling = [asyncio.ensure_future(self._sample(i)) for i in range(len(self.cluster.engines))]
        try:
            weights = [await self._compared(w, trace) for w, trace in zip(weights, traces, strict=True)]
            notes = [f"layers of engine {w.engine}: {w.uncovered}" for w in weights if w.uncovered]
            sampled = [await groups for groups in sampling]
            served = [after - before for before, after in zip(asked, await self._requests(), strict=True)]
            weights = [await self._asked_again(w, trace) for w, trace in zip(weights, traces, strict=True)]
            examined = [
                await self._samples(i, version, groups, requests)
                for i, (groups, requests) in enumerate(zip(sampled, served, strict=True))
            ]
        finally:
            for task in sampling:
                task.cancel()
        samples = [s for s, _, _ in examined]
        batches, trainer = [b for _, b, _ in examined], [t for _, _, t in examined]
        if not any(s.ended for s in samples):
            notes.append("EOS: no reply ended before the limit, so the token that ends a reply was not checked")
        evidence = Evidence(
            dtype=self.config.dtype,
            engine_facts=facts,
            learner_facts=mine,
            driver_facts=driver,
            weights=weights,
            samples=samples,
            clip=clipped_by_noise(self.config.objective, batches[0], trainer[0]),
            notes=notes,
        )
        return ParityCheck(
            config=self.config,
            evidence=evidence,
            findings=diagnose(evidence),
            batches=batches,
            trainer=trainer,
            seconds=time.perf_counter() - began,
        )

    async def compare(self, version: int) -> tuple[Gap, NoiseClip | None]:
        """Publish the learner's weights as `version`; then measure the gap alone, and what its noise would clip."""
        await self.learner.send(version, digesting=False)
        batch = collate(self._rows(await self._sample(0)))
        trainer = (await self.cluster.ask_learners(lambda rank: rank.logprobs(batch)))[0]
        clean = finite_part(batch, trainer)
        clip = clipped_by_noise(self.config.objective, clean, trainer)
        return gap(trainer, clean.rollout_logprobs, clean.mask), clip

    async def _facts(self) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
        prepared = self.prepared
        engines = await self.cluster.ask_engines(lambda e: e.describe(prepared.first_prompt, prepared.rendering))
        c = self.config
        files = model_config(c.model, trust_remote_code=c.trust_remote_code).get_text_config()
        driver = {
            "temperature": c.temperature,
            "truncation": c.rollout.truncation,
            "forbidden": (self.forbidden or Forbidden()).facts(),
            "dtype": c.dtype,
            "head_dtype": "float32" if c.fp32_head else c.dtype,
            "tied": bool(files.tie_word_embeddings),
            "architecture": architecture(files.to_dict()),
            "chat_template": prepared.tokenizer.chat_template,
            # Not `train[0]`: long prompts may be cut.
            "prompt": encode(prepared.tokenizer, prepared.first_prompt, prepared.rendering),
            "stop_ids": prepared.stop_ids,
            "vocabulary": len(prepared.tokenizer),
        }
        return engines, (await self.cluster.ask_learners(lambda rank: rank.describe()))[0], driver

    # -- weights ---------------------------------------------------------------------------------------------------

    async def _weights(self, version: int, probe: list[int]) -> tuple[list[WeightEvidence], list[Trace]]:
        """Digests on every side after an update, and traces of the engines' layers. `probe` has several blocks."""
        cluster = self.cluster
        # Fill the prefix cache under the old weights: nothing of it may be used after the update.
        await cluster.ask_engines(lambda e: e.sample(probe, 1, self.seed, max_tokens=1))
        manifest, _ = await self.learner.send(version, digesting=True)
        received = await cluster.ask_engines(lambda e: e.received_digests())
        counting = asyncio.ensure_future(cluster.ask_learners(lambda rank: rank.digests()))
        again = await cluster.ask_engines(lambda e: e.sample(probe, 1, self.seed, max_tokens=1))
        traces = await cluster.ask_engines(lambda e: e.trace(self._traced_prompt()))
        live = (await counting)[0]
        weights = [
            WeightEvidence(
                engine=index,
                version=version,
                sent=manifest.digests,
                live=live,
                received=received[index],
                layers=[],
                cached_after_update=again[index][0].cached_prompt_tokens,
            )
            for index in range(len(traces))
        ]
        return weights, traces

    async def _compared(self, evidence: WeightEvidence, trace: Trace) -> WeightEvidence:
        if len(trace) > 1:
            text = "not compared, because each worker of a tensor-parallel engine has only a shard of them"
            return replace(evidence, uncovered=text)
        answers = await self.cluster.ask_learners(lambda rank: rank.compare_layers(trace[0]))
        layers, between, unknown = answers[0]
        note = ""
        if unknown:
            note = f"not compared, the trainer has no layer of that name: {', '.join(unknown[:3])}"
        elif not between:
            note = "only the lm_head is visible in a compiled forward pass; --rollout.enforce-eager shows all layers"
        return replace(evidence, layers=layers, between=between, uncovered=note)

    async def _asked_again(self, w: WeightEvidence, trace: Trace) -> WeightEvidence:
        """Before a part is blamed: an engine with a random part differs from itself too. No other request may run."""
        if all(size(one) <= LAYER_ERROR[self.config.dtype] for one in (*w.layers, *w.between)):
            return w
        prompt = self._traced_prompt()
        asking = self.cluster.ask_engine(w.engine, lambda e: e.trace(prompt), deadline_s=self.config.deadlines.sample_s)
        again = await asking
        return replace(w, changes=first_change(trace[0], again[0], self.config.dtype))

    def _traced_prompt(self) -> list[int]:
        """The first prompt, repeated until it is long enough, as far as the context has room for a few more tokens."""
        ids = self.prompts[0].token_ids
        return (ids * TRACED_TOKENS)[: max(1, min(TRACED_TOKENS, self.config.rollout.max_model_len - 8))]

    def long_prompt(self, tokens: int = 160) -> list[int]:
        """A prompt of so many tokens or more, as far as the context has room."""
        r = self.config.rollout
        ids = self.prompts[-1].token_ids
        return (ids * 200)[: min(max(len(ids), tokens), r.max_model_len - r.max_tokens)]

    # -- samples ---------------------------------------------------------------------------------------------------

    def _enough(self, prompts: Sequence[Prompt]) -> int:
        return max(3, min(32, math.ceil(TOKENS / (len(prompts) * self.max_tokens))))

    def _asked(self, engine: int, prompt: Prompt) -> Asked:
        seed = self.seed * 7919 + engine * 101 + 1000 * prompt.ordinal
        if self.begins:
            seed = sample_seed(self.config.seed, prompt.ordinal) if self.config.rollout.seeded else None
        return tuple(prompt.token_ids), self.n, seed

    async def _sample(self, engine: int) -> list[list[Completion]]:
        async def sample(a: Asked) -> list[Completion]:
            deadline, most = self.config.deadlines.sample_s, self.max_tokens
            return await self.cluster.ask_engine(
                engine, lambda e: e.sample([*a[0]], *a[1:], None, most), deadline_s=deadline
            )

        asked = [self._asked(engine, p) for p in self.prompts]
        groups = await asyncio.gather(*map(sample, asked))
        self.groups = {a: [replace(c, engine=engine) for c in group] for a, group in zip(asked, groups, strict=True)}
        return groups

    async def _requests(self) -> list[int]:
        return [counters["requests"] for counters in await self.cluster.ask_engines(lambda e: e.counters())]

    async def _sampler(self, engine: int) -> SamplerEvidence | None:
        """A few replies one at a time, with the logits that the sampler had for each token."""
        traced = []
        for p in self.prompts[:TRACED_REPLIES]:
            seed, tokens = self.seed * 7919 + 31 + p.ordinal, min(self.max_tokens, TRACED_REPLY)
            reply = await self.cluster.ask_engine(
                engine,
                lambda e, p=p, seed=seed, tokens=tokens: e.trace_sampler(p.token_ids, seed, tokens),
                deadline_s=self.config.deadlines.sample_s,
            )
            traced.append((p, *reply))
        return sampler_evidence(engine, self.config, self.forbidden, traced)

    async def _samples(
        self, engine: int, version: int, groups: list[list[Completion]], served: int
    ) -> tuple[SampleEvidence, Batch, torch.Tensor]:
        cluster, rows = self.cluster, self._rows(groups)
        batch = collate(rows)
        config, cut, stops = self.config, self.config.rollout.truncation, list(self.prepared.stop_ids)
        # The engine samples while the learner computes.
        asked = cluster.ask_learners(lambda rank: rank.sampled(batch, stops, cut))
        sampler, ((trainer, entropy, drawn), *_) = await asyncio.gather(self._sampler(engine), asked)
        clean = finite_part(batch, trainer)
        finite = clean.mask
        banned = batch.mask & batch.rollout_logprobs.isfinite() & trainer.isneginf()
        nonfinite = int(batch.mask.sum() - finite.sum() - banned.sum())
        if drawn is None:
            raise ParityError(
                f"none of {int(batch.mask.sum())} tokens that engine {engine} sampled has a finite log-probability"
            )
        g = gap(trainer, clean.rollout_logprobs, clean.mask)
        witness = None
        if config.dtype != "float32" or not agrees(g, limit_of(config.dtype, config.temperature)):
            witness = (await cluster.ask_learners(lambda rank: rank.witness(clean, config.temperature, cut)))[0]
        lengths = integers(batch.mask.sum(dim=1))
        ended = [(row, t) for row, t in zip(batch.mask, rows, strict=True) if t.finish_reason == "stop"]
        evidence = SampleEvidence(
            engine=engine,
            gap=g,
            surprise=surprise(trainer, entropy, clean.mask),
            nonfinite=nonfinite,
            ended=len(ended),
            ended_without_stop_token=sum(not self._shows_its_end(row, t.token_ids) for row, t in ended),
            wrong_version=int((batch.versions[batch.mask] != version).sum()),
            forbidden=int(banned.sum()),
            too_long=sum(length > self.max_tokens for length in lengths),
            wrong_reason=sum(
                t.finish_reason == "length" and n < self.max_tokens for t, n in zip(rows, lengths, strict=True)
            ),
            requests=served / sum(map(len, groups)),
            draws=drawn,
            witness=witness,
            sampler=sampler,
        )
        return evidence, clean, trainer

    def _rows(self, groups: list[list[Completion]]) -> list[Trajectory]:
        pairs, apart = zip(self.prompts, groups, strict=True), self.n // self.looks
        return [trajectory(p, c, 0.0, {}) for p, group in pairs for c in group[::apart][: self.looks]]

    def _shows_its_end(self, mask: torch.Tensor, token_ids: list[int]) -> bool:
        """Whether a row trains on what ended its reply: a stop token at the end, or a text of `rollout.stop`."""
        trained = [token_ids[column + 1] for column in integers(mask.nonzero()[:, 0])]
        if trained and trained[-1] in self.prepared.stop_ids:
            return True
        wanted = self.config.rollout.stop
        text = self.prepared.decode(trained, skip_special_tokens=False) if wanted else ""
        return any(stop in text for stop in wanted)
