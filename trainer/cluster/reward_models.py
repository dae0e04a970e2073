"""The reward models of a run: for each an actor that hosts an engine. It gets no weights, and is started again."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ray.exceptions import RayActorError

from rl.config import Config
from rl.data import Given
from rl.judges import JudgeError, RewardModel
from rl.judges.reward_model import connect
from rl.protocols import EngineLost, StallError
from trainer.cluster.actors import scorer_process
from trainer.cluster.calls import answer, started
from trainer.cluster.placement import reward_models_of
from trainer.cluster.start_error import StartError
from trainer.cluster.stubs import ScorerProcess

Boot = Callable[[], tuple[ScorerProcess, Any]]
"""Starts a process; returns it, and what answers when its engine is built."""


class RewardModels:
    """Those of one run."""

    def __init__(self, config: Config) -> None:
        self.config, self.judges = config, reward_models_of(config)
        self.engines: list[FrozenEngine] = []
        self.causes: list[str] = []
        """Why engines were lost."""

    def boot(self, options: Sequence[dict[str, Any]], env: Mapping[str, str], sources: str, device: str) -> None:
        """Start their processes, and the engines in them. Waits for none."""

        def one(judge: RewardModel, own: dict[str, Any]) -> tuple[ScorerProcess, Any]:
            settings = {"judge": sent(judge), "device": device, "trust_remote_code": self.config.trust_remote_code}
            process = scorer_process(own, env)
            return process, process.build("rollout.scorer:Scorer", sources, settings)

        for judge, own in zip(self.judges, options, strict=True):
            self.engines.append(FrozenEngine(judge, partial(one, judge, own), self.config, self.causes))

    async def start(self) -> None:
        """Wait for the engines, and connect each judge with its own."""
        await asyncio.gather(*(engine.start() for engine in self.engines))
        for engine in self.engines:
            connect(engine.judge, engine.score)

    def close(self) -> list[ScorerProcess]:
        """Start none again; returns the processes."""
        for engine in self.engines:
            engine.over = "has ended with the run"
        return [engine.process for engine in self.engines]


class FrozenEngine:
    """The engine of one reward model. One that is lost is started again, at most `rollout.restarts` times, and the
    calls that it has lost are made again."""

    def __init__(self, judge: RewardModel, boot: Boot, config: Config, causes: list[str]) -> None:
        self.judge, self.config, self.causes, self._boot = judge, config, causes, boot
        self.process, self._building = boot()
        self.restarts = 0
        self.over = ""
        """Why it is not started again."""
        self._starting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Wait for the engine. Raises StartError and StallError."""
        deadline, late = self.config.deadlines.start_s, f"the driver waited {{s}} s for the judge {self.judge.shown} to"
        await started(f"the judge {self.judge.shown}", self._building, deadline)
        await answer(self.process.ask(lambda scorer: scorer.start()), f"{late} start", deadline, self.process)

    async def score(self, prompt: Given, reply: str) -> float:
        """The score of a reply. Raises JudgeError, also when the engine is lost and not started again."""
        late = f"the driver waited {{s}} s for the judge {self.judge.shown}"
        while True:
            # Shielded: a call that is late must not end the start that others wait for.
            if self._starting:
                await asyncio.shield(self._starting)
            if self.over:
                raise JudgeError(self.over)
            process = self.process
            try:
                asked = process.ask(lambda scorer: scorer.score(prompt, reply))
                return await answer(asked, late, self.judge.calls.seconds)
            except (RayActorError, EngineLost) as error:
                self._replace(process, str(error).splitlines()[0])

    def _replace(self, lost: ScorerProcess, why: str) -> None:
        """Start another process in place of a lost one, once for all the calls that it has lost."""
        if lost is not self.process or self.over:
            return
        self.causes.append(f"the judge {self.judge.shown} was lost: {why}")
        if self.restarts == self.config.rollout.restarts:
            self.over = f"was lost ({why}). It was restarted {self.restarts} times already (rollout.restarts)"
            return
        self.restarts += 1
        lost.kill()
        self.process, self._building = self._boot()
        self._starting = asyncio.create_task(self._start_again())

    async def _start_again(self) -> None:
        try:
            await self.start()
        except (StartError, StallError, EngineLost, RayActorError) as error:
            self.over = f"was lost, and cannot be started again: {error}"


def sent(judge: RewardModel) -> RewardModel:
    """A judge as its process gets it: the labelled cases stay on the driver."""
    return replace(judge, labelled=None)
