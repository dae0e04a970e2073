"""No split over ranks or ZeRO stages changes what is learned: same losses, same metrics, same weights."""

import json
import os
import shutil
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file

from models import make_model

WORKER = Path(__file__).parent / "rank_worker.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("ranks"), tied=True, peak=1.0)


Tensors = dict[str, torch.Tensor]


@cache
def trained(
    model: Path,
    objective: str,
    ranks: int,
    stage: int,
    dtype: str = "float32",
    resume: Path | None = None,
    more: Literal["", "lora", "offload", "sequence"] = "",
) -> tuple[list[dict], Tensors]:
    """Metrics by step, and the weights of before and after the last one. The state before it goes to `state_of`, unless
    the run begins with the one in `resume`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folder = resume or state_of(model, objective, ranks, stage, dtype, more)
    out = model / f"{objective}-{ranks}-{stage}-{dtype}-{more}{f'-from-{resume.stem}' if resume else ''}.pt"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    action = "resume" if resume else "train"
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore", str(WORKER)),
                *map(str, (r, ranks, stage, dtype, port, objective, model, out, folder, action, more)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for r in range(ranks)
    ]
    try:
        outputs = [p.communicate(timeout=180) for p in processes]
    finally:
        for p in processes:
            p.kill()
    ends = [(f"rank {r} ended with {p.returncode}", outputs[r][1][-3000:]) for r, p in enumerate(processes)]
    assert all(p.returncode == 0 for p in processes), ends
    line = next(x for x in outputs[0][0].splitlines() if x.startswith("HISTORY "))
    return json.loads(line.removeprefix("HISTORY ")), torch.load(out, weights_only=True)


def state_of(model: Path, objective: str, ranks: int, stage: int, dtype: str = "float32", more: str = "") -> Path:
    return model / f"{objective}-{ranks}-{stage}-{dtype}-{more}.state"


def tensors(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in sorted(folder.glob("layer-*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize(
    ("objective", "ranks", "stage"), [("grpo", 2, 0), ("grpo", 2, 2), ("grpo", 2, 3), ("ppo", 2, 1)]
)
def test_two_ranks_learn_what_one_learns(model: Path, objective: str, ranks: int, stage: int) -> None:
    one, weights_one = trained(model, objective, 1, 1)
    two, weights_two = trained(model, objective, ranks, stage)
    assert len(one) == 10
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
        assert abs(a["actor/loss"] - b["actor/loss"]) <= 1e-5
    # It did learn something, and the weights that leave are the same ones.
    assert abs(one[0]["actor/loss"] - one[9]["actor/loss"]) > 1e-4
    assert weights_one.keys() == weights_two.keys()
    for name, tensor in weights_one.items():
        # Adam turns a gradient's sign into a whole step, so single weights near zero gradient may differ more.
        assert (tensor - weights_two[name]).abs().mean() <= 1e-5, name


@pytest.mark.parametrize(
    ("objective", "ranks", "stage", "dtype"),
    [
        ("grpo", 2, 0, "float32"),
        ("ppo", 2, 1, "float32"),
        ("grpo", 2, 2, "float32"),
        ("grpo", 2, 3, "float32"),
        ("grpo", 2, 1, "bfloat16"),
        ("grpo", 2, 2, "bfloat16"),
    ],
)
def test_ranks_that_go_on_from_a_state_learn_bit_for_bit_as_if_they_had_never_stopped(
    model: Path, objective: str, ranks: int, stage: int, dtype: str
) -> None:
    whole, weights = trained(model, objective, ranks, stage, dtype)
    state = state_of(model, objective, ranks, stage, dtype)
    resumed, found = trained(model, objective, ranks, stage, dtype, state)
    assert resumed == whole[9:]
    assert weights.keys() == found.keys()
    assert [name for name in weights if not torch.equal(weights[name], found[name])] == []
    # Something was learned after the state, and the state is more than the weights.
    name = next(name for name in weights if name.endswith("embed_tokens.weight") and not name.startswith("before/"))
    assert not torch.equal(weights[name], weights[f"before/{name}"])
    held = tensors(state)
    assert all(held[key].any() for key in held if key.startswith("exp_avg/"))
    assert all(tensor.dtype == torch.float32 for tensor in held.values())


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16")],
)
def test_what_engines_get_is_the_gathered_master_rounded_bit_for_bit(model: Path, stage: int, dtype: str) -> None:
    _, weights = trained(model, "grpo", 2, stage, dtype)
    held = tensors(state_of(model, "grpo", 2, stage, dtype))
    masters = {key.removeprefix("weights/hf."): t for key, t in held.items() if key.startswith("weights/")}
    sent = {key.removeprefix("before/"): t for key, t in weights.items() if key.startswith("before/")}
    assert masters.keys() == sent.keys()
    for name, tensor in sent.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, masters[name].to(tensor.dtype)), name
    assert any(not torch.equal(t, t.bfloat16().float()) for t in masters.values())


def test_two_ranks_train_the_adapters_that_one_trains_and_leave_the_base_as_it_was(model: Path) -> None:
    one, weights_one = trained(model, "grpo", 1, 1, more="lora")
    two, weights_two = trained(model, "grpo", 2, 3, more="lora")
    for a, b in zip(one, two, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
    # The policy left the reference, which is itself without its adapters.
    assert one[0]["actor/kl_loss"] < 1e-4 < one[9]["actor/kl_loss"]
    base = load_file(model / "model.safetensors")
    for name, start in base.items():
        assert (weights_one[name] - weights_two[name]).abs().mean() <= 1e-6, name
        update = weights_two[name] - start
        if name.endswith("proj.weight"):
            assert update.abs().max() > 1e-4, name
            assert torch.linalg.svdvals(update)[4] < 1e-5, name  # adapters of rank 4
        else:
            assert not update.any(), name
    held = tensors(state_of(model, "grpo", 2, 3, more="lora"))
    assert all(".lora_A." in name or ".lora_B." in name for name in held)


def test_adapters_go_on_from_a_state_bit_for_bit_and_refuse_another_base(model: Path, tmp_path: Path) -> None:
    whole, weights = trained(model, "grpo", 2, 3, more="lora")
    state = state_of(model, "grpo", 2, 3, more="lora")
    resumed, found = trained(model, "grpo", 2, 3, resume=state, more="lora")
    assert resumed == whole[9:]
    assert [name for name in weights if not torch.equal(weights[name], found[name])] == []
    other = shutil.copytree(state, tmp_path / "other.state")
    counters = json.loads((other / "counters.json").read_text())
    (other / "counters.json").write_text(json.dumps(counters | {"base": "another"}))
    with pytest.raises(AssertionError, match="were trained on other weights: resume with the model of that run"):
        trained(model, "grpo", 1, 1, resume=other, more="lora")


@pytest.mark.parametrize(("objective", "stage"), [("grpo", 1), ("grpo", 3), ("ppo", 2)])
def test_two_ranks_that_share_every_row_learn_what_one_learns(model: Path, objective: str, stage: int) -> None:
    one, weights_one = trained(model, objective, 1, 1)
    two, weights_two = trained(model, objective, 2, stage, more="sequence")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
    for name, tensor in weights_one.items():
        assert (tensor - weights_two[name]).abs().mean() <= 1e-5, name


def test_an_optimizer_in_the_hosts_memory_steps_as_one_beside_the_weights(model: Path) -> None:
    here, weights = trained(model, "grpo", 2, 2)
    there, offloaded = trained(model, "grpo", 2, 2, more="offload")
    for a, b in zip(here, there, strict=True):
        assert b["actor/loss"] == pytest.approx(a["actor/loss"], abs=1e-6)
    for name in weights.keys() - {"random"}:
        assert (weights[name] - offloaded[name]).abs().mean() <= 1e-6, name


@pytest.mark.parametrize(
    ("objective", "before", "after"),
    # PPO's value head has a bias of one number, which two ranks cannot share.
    [
        ("grpo", (2, 3), (1, 0)),
        ("grpo", (2, 0), (1, 3)),
        ("grpo", (2, 3), (1, 1)),
        ("ppo", (1, 1), (2, 3)),
        ("ppo", (2, 1), (2, 2)),
    ],
)
def test_another_number_of_ranks_or_another_zero_stage_goes_on_with_the_same_state(
    model: Path, objective: str, before: tuple[int, int], after: tuple[int, int]
) -> None:
    whole, weights = trained(model, objective, *before)
    state = state_of(model, objective, *before)
    resumed, found = trained(model, objective, *after, resume=state)
    # What it took over is what was written, bit for bit, and it says so itself.
    again = model / f"{objective}-{after[0]}-{after[1]}-float32--from-{state.stem}.again"
    held, back = tensors(state), tensors(again)
    assert held.keys() == back.keys()
    assert [key for key in held if not torch.equal(held[key], back[key])] == []
    counters = json.loads((state / "counters.json").read_text())
    assert counters == json.loads((again / "counters.json").read_text())
    assert counters["optimizer_steps"] == 18
    # GRPO's began at 0.01 and were adapted in each of the nine steps.
    moved = {"kl_coef": 0.01 * 1.02**9, "entropy_coef": 0.01 + 9 * 0.005} if objective == "grpo" else {}
    assert counters["coefficients"] == pytest.approx(moved)
    assert resumed[0]["actor/lr"] == whole[9]["actor/lr"]
    for name in whole[9]:
        assert resumed[0][name] == pytest.approx(whole[9][name], rel=1e-5, abs=1e-6), name
    for name in weights.keys() - {"random"}:
        assert (weights[name] - found[name]).abs().max() <= (0 if name.startswith("before/") else 1e-6), name
