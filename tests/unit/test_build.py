"""A run on a device that this environment's torch cannot use is refused with the remedy, before anything starts."""

from pathlib import Path

import pytest
import torch

from trainer.cluster.placement import Placement
from trainer.plan import rules
from trainer.plan.rules import check_build, check_shared_memory


def build(monkeypatch: pytest.MonkeyPatch, *, cuda: str | None, gpus: int = 0, usable: bool = False) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)


def test_each_build_runs_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    build(monkeypatch, cuda=None)
    check_build("cpu")
    build(monkeypatch, cuda="13.0", gpus=1, usable=True)
    check_build("cuda")


def test_the_other_build_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build(monkeypatch, cuda=None)
    monkeypatch.setattr(rules, "DRIVER", tmp_path / "none")
    check_build("cuda")  # without a GPU another build is no remedy: the number of GPUs is said elsewhere
    monkeypatch.setattr(rules, "DRIVER", tmp_path)
    with pytest.raises(ValueError, match=r"build for CPU,.*scripts/setup cuda"):
        check_build("cuda")
    build(monkeypatch, cuda="13.0", gpus=1, usable=True)
    with pytest.raises(ValueError, match=r"build for CUDA 13\.0,.*scripts/setup cpu"):
        check_build("cpu")


def test_an_old_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    build(monkeypatch, cuda="13.0", gpus=8, usable=False)
    with pytest.raises(ValueError, match=r"8 GPUs and cannot use them: the driver is older than CUDA 13\.0"):
        check_build("cuda")


@pytest.mark.parametrize(("gpus", "free", "refused"), [(2, 64 << 20, True), (2, 2 << 30, False), (1, 64 << 20, False)])
def test_several_gpus_without_shared_memory_are_refused(
    monkeypatch: pytest.MonkeyPatch, gpus: float, free: int, refused: bool
) -> None:
    monkeypatch.setattr(rules, "shared_memory", lambda: free)
    how = {"device": "cuda", "backend": "nccl" if gpus > 1 else "ipc", "engines": 1, "learners": 1}
    placement = Placement(gpus_per_engine=gpus / 2, gpus_per_learner=gpus / 2, **how)
    if not refused:
        check_shared_memory(placement)
        return
    with pytest.raises(ValueError, match=r"/dev/shm has 0\.06 GiB free.*--shm-size=8g.*emptyDir"):
        check_shared_memory(placement)
