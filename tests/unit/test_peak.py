"""Which peak belongs to a GPU's name."""

import pytest
import torch

from trainer.learner.hardware import peak_flops, peak_of


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_gpu_has_the_peak_of_its_own_kind_or_none(name, peak):
    assert peak_flops(name) == peak


def test_a_cpu_has_none():
    assert peak_of(torch.device("cpu")) is None
