"""A learner that learns while its engine samples, and what its weights were at each version."""

import random

import torch

from pair import Pair
from rl.batch import collate
from rl.types import Batch, Trajectory


class Versions:
    """A pair whose learner takes real optimizer steps. Version 0 is what it starts with."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.held: dict[int, dict[str, torch.Tensor]] = {}
        self._publish()

    @property
    def now(self) -> int:
        """The version that the engine serves."""
        return self.pair.version

    def learn(self) -> None:
        """One step on a seeded batch, and one update of the engine."""
        metrics = self.pair.learner.step(batch(seed=self.now))
        assert metrics["actor/grad_norm"] > 0
        self._publish()

    def _publish(self) -> None:
        self.pair.version += 1
        self.held[self.pair.version] = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.pair.send(self.pair.version)

    @property
    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return self.pair.learner.weights.parameters

    def logprobs(self, batch: Batch) -> torch.Tensor:
        """The learner's log-probability of every token [B, T], by the weights of the version that sampled it."""
        said = torch.zeros_like(batch.rollout_logprobs)
        for version in batch.versions[batch.mask].unique().tolist():
            self._load(version)
            said = torch.where(batch.versions == version, self.pair.learner.logprobs(batch), said)
        self._load(self.now)
        return said

    @torch.no_grad()
    def _load(self, version: int) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self.held[version][name])


def batch(seed: int) -> Batch:
    """Two groups of three random replies, of which each has another reward."""
    r, made = random.Random(seed), list[Trajectory]()
    for group in range(2):
        for member in range(3):
            ids = [r.randrange(3, 100) for _ in range(20)]
            mask = [i >= 8 for i in range(20)]
            made.append(
                Trajectory(
                    group=group,
                    episode=member,
                    token_ids=ids,
                    mask=mask,
                    logprobs=[-4.5 if m else 0.0 for m in mask],
                    versions=[0 if m else -1 for m in mask],
                    reward=float(member),
                )
            )
    return collate(made)
