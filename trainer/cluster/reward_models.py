"""The reward models of a run: for each an actor that hosts an engine. It gets no weights, and it is not replaced."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ray.exceptions import RayActorError

from rl.config import Config
from rl.data import Given
from rl.judges import JudgeError, RewardModel
from rl.judges.reward_model import connect
from trainer.cluster.actors import scorer_process
from trainer.cluster.calls import answer, started
from trainer.cluster.placement import reward_models_of
from trainer.cluster.stubs import ScorerProcess


class RewardModels:
    """Those of one run."""

    def __init__(self, config: Config) -> None:
        self.config, self.judges = config, reward_models_of(config)
        self.processes: list[ScorerProcess] = []
        self.building: list[Any] = []

    def boot(self, options: Sequence[dict[str, Any]], sources: str, device: str) -> None:
        """Start their processes, and the engines in them. Waits for none."""
        for judge, own in zip(self.judges, options, strict=True):
            process = scorer_process(own)
            settings = {"judge": sent(judge), "device": device, "trust_remote_code": self.config.trust_remote_code}
            self.processes.append(process)
            self.building.append(process.build("rollout.scorer:Scorer", sources, settings))

    async def start(self) -> None:
        """Wait for the engines, and connect each judge with its own."""
        deadline = self.config.deadlines.start_s
        await asyncio.gather(
            *(started(f"the judge {j.shown}", ref, deadline) for j, ref in zip(self.judges, self.building, strict=True))
        )
        for judge, process in zip(self.judges, self.processes, strict=True):
            late = f"the driver waited {{s}} s for the judge {judge.shown} to start"
            await answer(process.ask(lambda scorer: scorer.start()), late, deadline, process)
            connect(judge, partial(score, judge, process))


def sent(judge: RewardModel) -> RewardModel:
    """A judge as its process gets it: the labelled cases stay on the driver."""
    return replace(judge, labelled=None)


async def score(judge: RewardModel, process: ScorerProcess, prompt: Given, reply: str) -> float:
    """The score of a reply. Raises JudgeError, also when the process is gone."""
    late = f"the driver waited {{s}} s for the judge {judge.shown}"
    try:
        return await answer(process.ask(lambda scorer: scorer.score(prompt, reply)), late, judge.calls.seconds)
    except RayActorError as error:
        raise JudgeError(f"has lost its process ({str(error).splitlines()[0]})") from None
