"""The engines and the ranks of a cluster, in the loop's own terms: sampling spread over engines, updates proven."""

import time

import torch

from rl.batch import collate, trajectory
from rl.protocols import SyncReport
from rl.types import Batch, Completion, Prompt
from rl.weights import WeightManifest, check_digests
from trainer.cluster import Cluster

PROBE_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2}
"""Mean |trainer - engine| in nats of the probe after a verified update; bf16 is noisy even against itself."""
PROBE_TOKENS = 16


class RemoteRollouts:
    """`rl.protocols.Rollouts` over the engines: each group goes to the engine with the fewest samples under way."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.load = [0] * len(cluster.engines)

    async def sample(
        self, token_ids: list[int], n: int, *, seed: int | None, temperature: float | None = None
    ) -> list[Completion]:
        """n completions of one prompt."""
        index = min(range(len(self.load)), key=lambda i: self.load[i])
        self.load[index] += n
        try:
            deadline = self.cluster.config.deadlines.sample_s
            return await self.cluster.ask_engine(index, "sample", token_ids, n, seed, temperature, deadline_s=deadline)
        finally:
            self.load[index] -= n


class RemoteLearner:
    """`rl.protocols.Learner` over the ranks. `probe` is a prompt for checking engines after a verified update."""

    def __init__(self, cluster: Cluster, *, probe: list[int], start_version: int = 0) -> None:
        self.cluster = cluster
        self.probe = Prompt(ordinal=-1, token_ids=probe, task={})
        self.first = start_version + 1

    async def step(self, batch: Batch) -> dict[str, float]:
        """Train on one step's batch; all ranks return the same metrics."""
        return (await self.cluster.ask_learners("step", batch))[0]

    async def publish(self, version: int) -> SyncReport:
        """Pause, send, commit, resume. When it fails the engines stay paused: they may hold half an update."""
        cluster, config = self.cluster, self.cluster.config
        every = config.verify_every
        verify = version == self.first or bool(every and version % every == 0)
        began = time.perf_counter()
        if verify:
            await cluster.ask_engines("listen_to_weights", True)
        await cluster.ask_engines("pause")
        manifests = await cluster.ask_learners("publish", version, verify, deadline_s=config.deadlines.sync_s)
        pauses = await cluster.ask_engines("resume")
        seconds = time.perf_counter() - began
        if verify:
            await self._verify(manifests[0])
        return SyncReport(seconds=seconds, pause_seconds=max(pauses), bytes=manifests[0].total_bytes(), verified=verify)

    async def _verify(self, manifest: WeightManifest) -> None:
        """Did every tensor arrive, bit for bit, and does each engine act like the trainer?

        Digests show what arrived, not what CPU packing made of it; the probe shows that, within PROBE_TOLERANCE.
        """
        cluster, config = self.cluster, self.cluster.config
        for index, workers in enumerate(await cluster.ask_engines("received_digests")):
            for digests in workers:
                check_digests(manifest.digests, digests, f"engine {index}")
        await cluster.ask_engines("listen_to_weights", False)
        for index in range(len(cluster.engines)):
            question = (self.probe.token_ids, 1, 0, None, PROBE_TOKENS)
            sampled = await cluster.ask_engine(index, "sample", *question, deadline_s=config.deadlines.sync_s)
            batch = collate([trajectory(self.probe, sampled[0], 0.0, {})])
            trainer: torch.Tensor = (await cluster.ask_learners("logprobs", batch))[0]
            gap = float((trainer - batch.rollout_logprobs)[batch.mask].abs().mean())
            limit = PROBE_TOLERANCE[config.dtype]
            if not gap <= limit:
                raise RuntimeError(
                    f"after update {manifest.version}, engine {index} and the trainer disagree by {gap:.2e} nats on "
                    f"average about the engine's own tokens (limit {limit:g}), although every tensor arrived: the "
                    "engine did not load what it received"
                )
