"""One real engine and one real learner rank in this process, answering as `trainer.cluster.cluster.Cluster` does."""

import asyncio
import os
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from live import Live
from rl.config import Config
from rl.types import Data, Example
from trainer.cluster.remote import RemoteLearner
from trainer.doctor.examine import Examiner
from trainer.learner.learner import Learner
from trainer.prompts import Prepared, prepare


def make_learner(config: Config) -> Learner:
    """A rank alone in its group; all learners of a process share that group, for DeepSpeed knows only one."""
    if dist.is_initialized():
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
        os.environ |= {name: os.environ.get(name, value) for name, value in alone.items()}  # vLLM has made the group
        with patch("trainer.learner.learner.join_group"):
            return Learner(config, rank=0, device="cpu", address="", port=0, model=config.model)
    return Learner(config, rank=0, device="cpu", address="127.0.0.1", port=0, model=config.model)


class Pair:
    """A stand-in for the cluster. `sent` may replace the tensors that travel, `learner` may serve several pairs."""

    def __init__(self, config: Config, engine: Live, learner: Learner, sent: Any = None) -> None:
        self.config, self.live, self.learner = config, engine, learner
        self.engines = {0: engine}
        self.version = -1
        sender = engine.open_sender(learner.weights if sent is None else sent)

        def send(version: int) -> None:
            engine.version = version
            sender.send_weights()

        self.send = send

    async def ask_engine(self, index: int, ask: Any, *, deadline_s: float) -> Any:
        return await asyncio.wrap_future(self.live.submit(ask(self.live.engine)))

    async def ask_engines(self, ask: Any, *, deadline_s: float | None = None) -> list[Any]:
        return [await self.ask_engine(0, ask, deadline_s=0.0)]

    async def ask_learners(self, ask: Any, *, deadline_s: float | None = None) -> list[Any]:
        self.learner.connect(self)
        return [await asyncio.to_thread(ask, self.learner)]


def examiner(pair: Pair, prompts: list[str | list[dict[str, str]]], seed: int = 0) -> Examiner:
    """The pair as the doctor sees it, with these prompts."""
    examples = [Example(prompt=p) for p in prompts]
    prepared: Prepared = prepare_data(pair.config, examples)
    learner = RemoteLearner(pair, probe=prepared.train[0].token_ids)
    return Examiner(pair, learner, prepared, seed=seed)


def prepare_data(config: Config, examples: list[Example]) -> Prepared:
    return prepare(replace(config, data=lambda: Data(train=examples)))
