"""What is the peak speed of the accelerators? The denominator of `perf/mfu`."""

import torch

DENSE_BF16 = {
    ("B200",): 2250e12,
    ("H100", "NVL"): 835e12,
    ("H100", "PCIe"): 756e12,
    ("H100",): 989e12,
    ("H200", "NVL"): 835e12,
    ("H200",): 989e12,
    ("GH200",): 989e12,
    ("A100",): 312e12,
    ("L40S",): 362e12,
    ("L4",): 121e12,
}
"""FLOP/s without sparsity by words of a GPU's name, from NVIDIA's data sheets; the first match counts."""


def peak_flops(device_name: str) -> float | None:
    """FLOP/s in bf16 of a GPU by its name (`torch.cuda.get_device_name`); None for a GPU that is not listed."""
    words = set(device_name.replace("-", " ").split())
    return next((peak for name, peak in DENSE_BF16.items() if words.issuperset(name)), None)


def peak_of(device: torch.device) -> float | None:
    """The same for a device; None for a CPU, whose peak depends on how many cores a rank gets."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
