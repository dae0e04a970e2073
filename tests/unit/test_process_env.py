"""What travels to the actors: nothing that stays on the driver, and nothing that cannot be sent."""

import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from ray import cloudpickle
from ray._private.node import Node

from rl.config import Config
from rl.objectives import GRPO
from rl.types import Data
from trainer.cluster import process_env
from trainer.cluster.process_env import UNUSED, ray_environment, started_soon, without_functions

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


def test_workers_on_a_cpu_keep_their_memory_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    with ray_environment("cpu"):
        assert os.environ["MALLOC_ARENA_MAX"] == "1"
        assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "1"
    assert "MALLOC_ARENA_MAX" not in os.environ
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "1"
    with ray_environment("cuda"):
        assert "MALLOC_ARENA_MAX" not in os.environ


def test_ray_starts_without_the_parts_that_no_run_uses_and_has_them_again_afterwards() -> None:
    before = [getattr(Node, name) for name in (*UNUSED, "start_raylet")]
    with ray_environment():
        assert all(isinstance(getattr(Node, name), Mock) for name in UNUSED)
        assert Node.start_raylet is started_soon
    assert [getattr(Node, name) for name in (*UNUSED, "start_raylet")] == before


def test_the_node_finds_that_its_agent_has_no_ports_and_is_known_when_its_start_returns(tmp_path: Path) -> None:
    class Head:
        """Knows the node when it is asked for the third time."""

        asked = 0

        def get_all_node_info(self) -> dict[str, str]:
            self.asked += 1
            return {"node": "alive"} if self.asked == 3 else {}

    head, found = Head(), []
    node = SimpleNamespace(get_session_dir_path=lambda: str(tmp_path), node_id="a" * 56, get_gcs_client=lambda: head)
    started_soon(node, start=lambda node: found.extend(path.read_text() for path in tmp_path.iterdir()))
    assert found == ["-1"] * 3
    assert head.asked == 3


def test_ray_of_a_version_without_a_part_starts_as_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(Node, "start_monitor")
    monkeypatch.setattr(process_env, "RAYLET", {})
    with ray_environment():
        head = SimpleNamespace(get_all_node_info=lambda: {"node": "alive"})
        started_soon(SimpleNamespace(get_gcs_client=lambda: head), start=lambda node: None)
    assert not hasattr(Node, "start_monitor")


def test_a_node_that_the_head_never_knows_is_left_to_ray_to_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process_env, "LATE_S", 0.1)
    head = SimpleNamespace(get_all_node_info=dict)
    node = SimpleNamespace(get_session_dir_path=lambda: str(tmp_path), node_id="a" * 56, get_gcs_client=lambda: head)
    started_soon(node, start=lambda node: None)
