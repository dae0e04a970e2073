"""How much memory and time does a learner rank need in each phase of its work?"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

Span = tuple[str, float, float]
"""A phase, and when it began and ended: seconds since 1970."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak memory by phase in GiB: allocated by torch on a GPU, the process's resident set on CPU (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phases: dict[str, float] = {}
        self.highest = 0.0
        self.spans: list[Span] = []

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Measure the peak within a phase. Phases do not nest."""
        self.highest = max(self.highest, self._peak())
        self._forget()
        began = time.time()
        try:
            yield
        finally:
            peak = self._peak()
            self.phases[phase] = max(self.phases.get(phase, 0.0), peak)
            self.highest = max(self.highest, peak)
            self.spans = [*self.spans[-999:], (phase, began, time.time())]

    def take_spans(self) -> list[Span]:
        """When the phases since the last call were, at most the last 1000."""
        spans, self.spans = self.spans, []
        return spans

    def report(self) -> dict[str, float]:
        """Peaks since the last report, as metrics; the maximum over ranks counts."""
        phases, self.phases = self.phases, {}
        return {f"memory/{phase}_gib_max": peak for phase, peak in phases.items()}

    def _peak(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        with suppress(OSError):
            kib = next(line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
            return int(kib) / 2**20
        return 0.0

    def _forget(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # a container may forbid it; then a phase includes the peaks of earlier phases
                CLEAR.write_text("5")
