"""The learner's calls to the engines during a weight update."""

from typing import Any

import ray

from rl.protocols import StallError


class EngineClient:
    """vLLM's four control calls, to all engines at once, with a deadline; used on learner rank 0."""

    def __init__(self, engines: list[Any], workers_per_engine: int, deadline_s: float) -> None:
        self.engines, self.workers, self.deadline_s = engines, workers_per_engine, deadline_s
        self.version = 0

    def _all(self, method: str, *args: Any) -> None:
        refs = [engine.call.remote(method, *args) for engine in self.engines]
        self._wait(refs, method)

    def _wait(self, refs: list[Any], what: str) -> None:
        try:
            ray.get(refs, timeout=self.deadline_s)
        except ray.exceptions.GetTimeoutError:
            _, late = ray.wait(refs, num_returns=len(refs), timeout=0)
            names = [i for i, ref in enumerate(refs) if ref in late]
            raise StallError(
                f"the learner waited {self.deadline_s:g} s for engines {names} to {what} (version {self.version})"
            ) from None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every engine gets a rank range of its own (vLLM's Ray client gives all of them the same)."""
        refs = []
        for index, engine in enumerate(self.engines):
            mine = dict(init_info)
            if "rank_offset" in mine:
                mine["rank_offset"] = 1 + index * self.workers
            refs.append(engine.call.remote("init_weight_transfer_engine", mine))
        self._wait(refs, "join the weight channel")

    def stage_weights(self, version: int) -> None:
        """Receive beside the live weights (CPU)."""
        self._all("stage_weights", version)

    def start_weight_update(self) -> None:
        """Pause and begin."""
        self._all("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive."""
        self._all("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Commit as the version that `publish` set (vLLM's own senders give none), and resume."""
        self._all("finish_weight_update", self.version)
