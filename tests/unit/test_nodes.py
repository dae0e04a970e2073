"""Several nodes: ranks in the order of nodes and devices, one folder, one model, one environment without secrets."""

import random
import sys
from pathlib import Path

import pytest

from rl.config import Config, RolloutConfig, TrainerConfig
from rl.types import Data
from trainer.cluster.nodes import code
from trainer.cluster.nodes.code import beside_recipe, on_this_node, pinned
from trainer.cluster.nodes.folder import answer_word, judge, write_word
from trainer.cluster.nodes.seats import Seat, in_order, packs
from trainer.cluster.placement import check_fits, place
from trainer.cluster.process_env import travelling


def seat(node: str, *devices: int) -> Seat:
    return Seat(node, f"10.0.0.{ord(node)}", devices)


def test_ranks_are_numbered_by_node_and_device_and_begin_where_the_driver_is():
    seats = [seat("a", 1), seat("b", 0), seat("a", 0), seat("b", 1)]
    assert in_order(seats, "b") == [1, 3, 2, 0]
    assert in_order(seats, "a") == [2, 0, 1, 3]
    assert in_order(seats, "driver without GPUs") == [2, 0, 1, 3]


def test_ranks_that_share_rows_stay_neighbours_inside_their_node():
    seats = [seat("b", 2), seat("b", 0), seat("a", 3), seat("a", 1), seat("b", 1), seat("b", 3)]
    assert in_order(seats, "b", 2) == [1, 0, 4, 5, 3, 2]
    with pytest.raises(AssertionError, match="a bundle lies on one node"):
        in_order([seat("a", 0), seat("b", 0)], "a", 2)


def test_what_fits_on_nodes_is_what_a_search_finds():
    def searched(units: list[float], nodes: list[float]) -> bool:
        if not units:
            return True
        options = {i for i, free in enumerate(nodes) if free >= units[0]}
        return any(searched(units[1:], [free - units[0] * (i == o) for i, free in enumerate(nodes)]) for o in options)

    draw = random.Random(0)
    fitted = 0
    for _ in range(400):
        units = [float(draw.choice([1, 2, 4])) for _ in range(draw.randint(1, 6))]
        nodes = [float(draw.choice([1, 2, 3, 4, 8])) for _ in range(draw.randint(1, 3))]
        assert packs(units, nodes) == searched(units, nodes), (units, nodes)
        fitted += searched(units, nodes)
    assert 50 < fitted < 350


def test_a_shape_that_no_node_can_hold_is_refused_with_the_nodes():
    def placed(tp: int = 1, sp: int = 1, engines: int = 1, ranks: int = 2):
        rollout, trainer = (
            RolloutConfig(engines=engines, tensor_parallel=tp),
            TrainerConfig(ranks=ranks, sequence_parallel=sp),
        )
        config = Config(
            name="t", model="m", data=Data(train=[]), reward=lambda _: 0.0, rollout=rollout, trainer=trainer
        )
        return place(config, cuda=True)

    check_fits(placed(tp=4, ranks=4), gpus=8, nodes=[4, 4])
    with pytest.raises(ValueError, match=r"nodes with 4, 4 GPUs: an engine \(rollout.tensor_parallel=8\) is on one"):
        check_fits(placed(tp=8), gpus=16, nodes=[4, 4])
    check_fits(placed(sp=4, ranks=4, tp=4), gpus=8, nodes=[4, 4])
    with pytest.raises(ValueError, match=r"trainer.sequence_parallel=4"):
        check_fits(placed(sp=4, ranks=4, engines=4), gpus=8, nodes=[2, 2, 2, 2])


def test_a_folder_that_another_node_does_not_share_is_named_and_nothing_is_left(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    word = write_word(run)
    good = answer_word(str(run), 0)
    nowhere = answer_word(str(tmp_path / "nowhere"), 1)
    (elsewhere / ".same-folder-driver").write_text("another run's")
    other = answer_word(str(elsewhere), 2)
    found = judge(run, word, [good, nowhere, other])
    assert found[0] == ""
    assert "FileNotFoundError" in found[1]
    assert "it reads another file" in found[2]
    assert not list(run.iterdir())


def test_a_rank_that_only_reads_the_folder_is_refused(tmp_path):
    word = write_word(tmp_path)
    assert "does not see what it writes" in judge(tmp_path, word, [("n2", word, "")])[0]


def test_the_drivers_variables_reach_other_nodes_and_its_secrets_do_not():
    mine = {
        "NCCL_DEBUG": "INFO",
        "HF_HOME": "/hub",
        "HF_TOKEN": "s",
        "PATH": "/bin",
        "VLLM_API_KEY": "s",
        "WANDB_API_KEY": "s",
    }
    assert travelling(mine) == {"NCCL_DEBUG": "INFO", "HF_HOME": "/hub"}


def test_modules_beside_a_recipe_travel_and_installed_ones_do_not(tmp_path, monkeypatch):
    (tmp_path / "my_helpers.py").write_text("X = 1\n")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_helpers", "my_package"):
        __import__(name)
    try:
        found = beside_recipe()
        assert {str(tmp_path / "my_helpers.py"), str(tmp_path / "my_package")} <= set(found)
        assert not [path for path in found if "site-packages" in path or path.endswith(("/rl", "/trainer", "/rollout"))]
    finally:
        del sys.modules["my_helpers"], sys.modules["my_package"]


def test_a_model_folder_must_be_on_every_node(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert pinned("m") == (str(tmp_path / "m"), "")
    assert on_this_node(str(tmp_path / "m"), "") == str(tmp_path / "m")
    with pytest.raises(ValueError, match="is not on this node"):
        on_this_node(str(tmp_path / "gone"), "")


def test_every_node_takes_the_commit_that_the_driver_found(monkeypatch):
    asked = []

    def fetch(model: str, **options):
        asked.append(options.get("revision"))
        return f"/hub/models--o--m/snapshots/{options.get('revision') or 'abc123'}"

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    model, revision = pinned("o/m")
    assert (model, revision) == ("o/m", "abc123")
    assert Path(on_this_node(model, revision)).name == "abc123"
    assert asked == [None, "abc123"]
    assert code.pinned is pinned
