"""The learner's calls to the engines during a weight update."""

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from rl.protocols import StallError
from trainer.cluster.stubs import AskEngine, EngineProcess, recorded

REST_S = 10.0
"""Seconds in which the other engines end an update after one has failed in it."""


class EngineClient:
    """vLLM's four control calls, to all engines at once, with a deadline; used on learner rank 0.

    A `patient` one goes on with the other engines where one has failed in an update: see `raise_failed`.
    """

    def __init__(
        self, engines: Mapping[int, EngineProcess], workers_per_engine: int, deadline_s: float, *, patient: bool = False
    ) -> None:
        self.engines, self.workers, self.deadline_s = dict(engines), workers_per_engine, deadline_s
        self.patient, self.failed = patient, dict[int, Exception]()
        self.version = 0
        self.receiving: dict[int, Any] = {}
        """The engines' answers to the last `update_weights`."""

    def _all(self, ask: AskEngine[Any], *, patient: bool) -> None:
        """Ask all that have not failed. A patient call waits for each of them, and keeps the errors."""
        asked = {i: engine.ask(ask) for i, engine in self.engines.items() if i not in self.failed}
        what, deadline = recorded(ask).method, time.monotonic() + self.deadline_s
        for some in [{i: ref} for i, ref in asked.items()] if patient else [asked]:
            try:
                self._wait(some, what, max(0.0, deadline - time.monotonic()))
            except Exception as error:  # see `raise_failed`
                if not patient:
                    raise
                self.failed |= dict.fromkeys(some, error)

    def raise_failed(self) -> None:
        """At the end of an update: raise the error of the first engine that failed in it."""
        failed, self.failed = self.failed, {}
        for error in failed.values():
            raise error

    def _wait(self, asked: Mapping[int, Any], what: str, seconds: float | None = None) -> None:
        refs = list(asked.values())
        try:
            ray.get(refs, timeout=self.deadline_s if seconds is None else seconds)
        except GetTimeoutError:
            _, late = ray.wait(refs, num_returns=len(refs), timeout=0)
            names = [i for i, ref in asked.items() if ref in late]
            raise StallError(
                f"the learner waited {self.deadline_s:g} s for engines {names} to {what} (version {self.version})"
            ) from None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every engine gets a rank range of its own (vLLM's Ray client gives all of them the same)."""
        asked = {}
        for place, (index, engine) in enumerate(self.engines.items()):
            own = dict(init_info)
            if "rank_offset" in own:
                own["rank_offset"] = 1 + place * self.workers
            asked[index] = engine.ask(lambda e, info=own: e.init_weight_transfer_engine(info))
        self._wait(asked, "join the weight channel")

    def stage_weights(self, version: int) -> None:
        """Receive next to the live weights (CPU)."""
        self._all(lambda e: e.stage_weights(version), patient=False)

    def start_weight_update(self) -> None:
        """Pause and begin."""
        self._all(lambda e: e.start_weight_update(), patient=self.patient)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive. Raises the first engine's error, while others may still receive."""
        if self.patient:
            self._all(lambda e: e.update_weights(update_info), patient=True)
            return
        self.receiving = {i: e.ask(lambda e: e.update_weights(update_info)) for i, e in self.engines.items()}
        self._wait(self.receiving, "receive the weights")

    def finish_received(self) -> None:
        """After a failed update: commit and resume on the engines that received all of it."""
        ray.wait(list(self.receiving.values()), num_returns=len(self.receiving), timeout=REST_S)
        whole = [i for i, answer in self.receiving.items() if _came(answer)]
        self._wait({i: self.engines[i].ask(lambda e: e.finish_weight_update(self.version)) for i in whole}, "commit")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Commit as the version that `publish` set (vLLM's own senders give none), and resume.

        Raises an engine's error when all have ended: one that is still at it would look as if it had failed.
        """
        self._all(lambda e: e.finish_weight_update(self.version), patient=True)
        if not self.patient:
            self.raise_failed()


def _came(answer: Any) -> bool:
    """Whether a call has ended, without an error."""
    try:
        ray.get(answer, timeout=0)
    except (RayError, GetTimeoutError):
        return False
    return True
