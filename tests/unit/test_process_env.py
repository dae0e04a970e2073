"""What travels to the actors: nothing that stays on the driver, and nothing that cannot be sent."""

import threading
from dataclasses import dataclass, replace
from typing import Any

import pytest
from ray import cloudpickle

from rl.config import Config
from rl.objectives import GRPO
from rl.types import Data
from trainer.cluster.process_env import without_functions

LOCK = threading.Lock()


class Judge:
    """A reward with a client, which cannot be pickled."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, reply):
        return 0.0


CONFIG = Config(name="t", model="m", data=lambda: Data(train=[LOCK]), reward=Judge(), eval_reward=Judge())


@dataclass(frozen=True, kw_only=True)
class Locked(GRPO):
    guard: Any = None


def test_rewards_and_data_that_cannot_be_sent_are_not_sent():
    sent = cloudpickle.loads(cloudpickle.dumps(without_functions(CONFIG)))
    assert (sent.name, sent.eval_reward, sent.filters) == ("t", None, ())


def test_a_setting_that_cannot_be_sent_is_named_with_the_reason():
    config = replace(CONFIG, objective=Locked(guard=LOCK))
    with pytest.raises(ValueError, match=r"objective=Locked\(.*cannot be sent .*cannot pickle '_thread.lock' object"):
        without_functions(config)


def test_a_rank_counts_the_tokens_of_an_episode_as_the_driver_does():
    class Env:
        pass

    given = replace(CONFIG, reward=None, eval_reward=None, env=Env)
    assert without_functions(given).horizon == given.horizon != CONFIG.horizon
