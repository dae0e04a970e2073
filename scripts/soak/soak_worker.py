"""What may differ between two starts of an engine, as its worker process sees it; scripts/soak/soak.py asks for it."""

import os
from typing import Any

import torch

from rollout.worker import WorkerExtension


class Soaked(WorkerExtension):
    """A worker that describes its process, and can spoil its own memory."""

    def conditions(self) -> dict[str, Any]:
        """Threads, addresses and OpenMP settings of this process, and the largest error of its rotary embedding."""
        model, rotary = self.weight_transfer_engine.model, self._rotary()
        return {
            "pid": os.getpid(),
            "threads": torch.get_num_threads(),
            "cores": sorted(os.sched_getaffinity(0)),
            "omp": {n: v for n, v in os.environ.items() if n.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))},
            "weights_at": next(model.parameters()).data_ptr(),
            "cache_at": self._caches()[0].data_ptr(),
            "rotary_error": rotary_error(rotary.cos_sin_cache, rotary._compute_inv_freq(rotary.base)),
        }

    def spoil_cache(self, value: float) -> int:
        """Fill every block of the KV cache with a value; returns the number of layers. Nothing may be under way."""
        for cache in self._caches():
            cache.fill_(value)
        return len(self._caches())

    def spoil_rotary(self, cos: bytes, sin: bytes) -> None:
        """Put other values into the first rows of the rotary embedding: fp32, [rows, features]; empty to leave one."""
        for columns, data in zip(self._rotary().cos_sin_cache.chunk(2, dim=-1), (cos, sin), strict=True):
            if data:
                new = torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, columns.shape[1])
                columns[: len(new)] = new

    def _caches(self) -> list[torch.Tensor]:
        runner: Any = self  # vLLM's worker, which this class is mixed into
        return list(runner.model_runner.kv_caches)

    def _rotary(self) -> Any:
        """The layer that turns queries and keys, which all others share."""
        modules = self.weight_transfer_engine.model.modules()
        return next(m for m in modules if isinstance(getattr(m, "cos_sin_cache", None), torch.Tensor))


def rotary_error(turns: torch.Tensor, inverse_frequencies: torch.Tensor) -> float:
    """Largest error of a table of cosines and sines, [positions, 2 * frequencies]."""
    angles = torch.outer(torch.arange(len(turns), dtype=torch.float), inverse_frequencies).double()
    return float((turns.double() - torch.cat([angles.cos(), angles.sin()], dim=-1)).abs().max())
