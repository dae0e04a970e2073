"""Triton's interface of a driver, for the CPU's memory."""

from typing import Any

import torch
from triton.backends import driver
from triton.backends.compiler import GPUTarget


class InterpretedDriver(driver.DriverBase):
    """Says where tensors are; launches nothing."""

    @classmethod
    def is_active(cls) -> bool:
        return False  # as Triton expects of a CPU; vLLM's CPU build takes it all the same

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Any:
        raise RuntimeError("kernels are interpreted, and nothing is tuned")

    def get_empty_cache_for_benchmark(self) -> Any:
        raise RuntimeError("kernels are interpreted, and nothing is tuned")

    def clear_cache(self, cache: Any) -> None:
        pass
