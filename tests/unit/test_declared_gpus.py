"""Which GPUs does each actor get? Ray with declared GPUs, which nobody computes on."""

from collections.abc import Iterator
from typing import Any

import pytest
import ray

from cases import nightly_unless
from rl.checkout import ROOT
from rl.config import Config, RolloutConfig, TrainerConfig
from rl.types import Data
from trainer.cluster.actors import ActorShell, watched
from trainer.cluster.cluster import Cluster
from trainer.cluster.placement import check_shared, place
from trainer.cluster.process_env import ray_environment


@pytest.fixture(scope="module")
def eight_gpus() -> Iterator[None]:
    with ray_environment():
        quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
        ray.init(address="local", num_cpus=16, num_gpus=8, _node_ip_address="127.0.0.1", **quiet)
    yield
    ray.shutdown()


LAYOUTS = {
    "shared": ({"share_gpu": True}, (1, 1, 1), [["0"], ["0"]]),
    "2 shared": ({"share_gpu": True}, (2, 1, 2), [["0"], ["1"], ["0"], ["1"]]),
    "4 + 4": ({}, (4, 1, 4), [["0"], ["1"], ["2"], ["3"], ["4"], ["5"], ["6"], ["7"]]),
    "2 x TP 2 + 4": ({}, (2, 2, 4), [["0", "1"], ["2", "3"], ["4"], ["5"], ["6"], ["7"]]),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", nightly_unless(lambda layout: layout == "2 shared", LAYOUTS))
def test_every_engine_and_rank_has_gpus_of_its_own_unless_one_is_shared(eight_gpus: None, layout: str) -> None:
    more, (engines, tp, ranks), expected = LAYOUTS[layout]
    rollout, trainer = RolloutConfig(engines=engines, tensor_parallel=tp), TrainerConfig(ranks=ranks)
    made = {"name": "t", "model": "m", "data": Data(train=[]), "reward": lambda reply: 0.0}
    config = Config(**made, rollout=rollout, trainer=trainer, **more)
    cluster = Cluster(config, place(config, cuda=True, gpus=8))
    cluster.started_ray = True  # on one machine no rank must be near the driver
    ours = {"runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}}}
    actors = [watched(ActorShell).options(**options, **ours).remote() for options in cluster._actor_options()]
    try:
        places = ray.get([actor.gpus.remote() for actor in actors], timeout=300)
        found = [gpus for _, *gpus in places]
        # Ray may number nodes' GPUs in any order, but nobody has another one's.
        assert [len(gpus) for gpus in found] == [len(gpus) for gpus in expected]
        assert len({gpu for gpus in found for gpu in gpus}) == len({gpu for gpus in expected for gpu in gpus})
        if "shared" in layout:
            check_shared(places[:engines], places[engines:])
            assert found[:engines] == found[engines:], "engine i and rank i"
    finally:
        for actor in actors:
            ray.kill(actor)
        ray.util.remove_placement_group(cluster.group)


def test_an_engine_and_a_learner_on_two_gpus_cannot_share_one() -> None:
    first, second = ["node 1", "0"], ["node 2", "0"]
    check_shared([first, second], [second, first])
    for other in (["node 1", "1"], second):
        with pytest.raises(ValueError, match=r"Ray gave \(node, GPU\).*share_gpu=False"):
            check_shared([first], [other])
