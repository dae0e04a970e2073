"""No split over ranks or ZeRO stages changes what is learned: same losses, same metrics, same weights."""

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from models import make_model

WORKER = Path(__file__).parent / "rank_worker.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("ranks"), tied=True, peak=1.0)


@cache
def trained(model: Path, objective: str, ranks: int, stage: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out = model / f"{objective}-{ranks}-{stage}.pt"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER), *map(str, (r, ranks, stage, port, objective, model, out))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for r in range(ranks)
    ]
    outputs = [p.communicate(timeout=180) for p in processes]
    ends = [(f"rank {r} ended with {p.returncode}", outputs[r][1][-3000:]) for r, p in enumerate(processes)]
    assert all(p.returncode == 0 for p in processes), ends
    line = next(x for x in outputs[0][0].splitlines() if x.startswith("HISTORY "))
    return json.loads(line.removeprefix("HISTORY ")), torch.load(out, weights_only=True)


@pytest.mark.parametrize(("objective", "ranks", "stage"), [("grpo", 2, 2), ("grpo", 2, 3), ("ppo", 2, 1)])
def test_two_ranks_learn_what_one_learns(model: Path, objective: str, ranks: int, stage: int) -> None:
    one, weights_one = trained(model, objective, 1, 1)
    two, weights_two = trained(model, objective, ranks, stage)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
        assert abs(a["actor/loss"] - b["actor/loss"]) <= 1e-5
    # It did learn something, and the weights that leave are the same ones.
    assert abs(one[0]["actor/loss"] - one[2]["actor/loss"]) > 1e-4
    start = torch.load(model / f"{objective}-1-1.pt", weights_only=True)
    assert start.keys() == weights_two.keys()
    for name, tensor in weights_one.items():
        # Adam turns a gradient's sign into a whole step, so single weights near zero gradient may differ more.
        assert (tensor - weights_two[name]).abs().mean() <= 1e-5, name
