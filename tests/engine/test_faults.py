"""The fault matrix on a real engine: each fault in each phase of an update, while the engine samples.

Whatever happens, no request is aborted, every token was sampled with the whole of the version that it carries, and the
next update arrives.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import rollout.weights.channel
import rollout.weights.sender
from cases import nightly_unless
from live import Live, engine_config
from rl.batch import collate, trajectory
from rl.protocols import EngineLost, UpdateFailed
from rl.types import Completion, Prompt
from trainer.learner.weights import LearnerWeights
from trainer.model.policy import load
from wire import FAULTS, with_fault

PROMPT = list(range(10, 40))
TOKENS = 80
TOLERANCE = 1e-5
"""Mean |trainer - engine| in nats per version, fp32."""


class Updates:
    """An engine that samples all the while, and the models of each version."""

    def __init__(self, engine: Live, models: list[Path]) -> None:
        self.engine, self.models, self.of = engine, models, {0: 0}
        """`of`: which model each version is."""
        self.version = 0
        self.policies = [load(str(m), dtype="float32", fp32_head=True, share_prompts=False) for m in models]
        self.hf = [AutoModelForCausalLM.from_pretrained(m) for m in models]
        self.sender: Any = None

    def open(self, client: Any = None, timeout_s: float = 60) -> Any:
        """A sender of the model that is not being served now, as the next version."""
        engine = client or self.engine
        self.next = 1 - self.of[self.version]
        self.engine.version = self.version + 1
        self.sender = Live.open_sender(engine, LearnerWeights(self.hf[self.next], sharded=False), timeout_s)
        return self.sender

    def sent(self) -> None:
        """What the open sender was for has been committed."""
        self.version += 1
        self.of[self.version] = self.next

    def sampling(self) -> Any:
        """Begin to sample; its result is checked by `check`."""
        return self.engine.keep_sampling(PROMPT, 4, TOKENS)

    def check(self, completions: list[Completion]) -> set[int]:
        """Every token against the model of its own version; returns the versions that sampled."""
        assert all(c.finish_reason != "abort" for c in completions)
        assert self.engine.wait(self.engine.engine.counters())["aborted"] == 0
        prompt = Prompt(ordinal=0, token_ids=PROMPT, task={})
        batch = collate([trajectory(prompt, c, 0.0, {}) for c in completions])
        seen = set(batch.versions[batch.mask].tolist())
        # Tokens after a switch stand on the old version's KV, so only a first version can be compared, and fresh ones.
        first = min(seen)
        mine = self.logprobs(first, batch)
        where = batch.mask & (batch.versions == first)
        assert float((mine - batch.rollout_logprobs)[where].abs().mean()) <= TOLERANCE
        fresh = collate([trajectory(prompt, c, 0.0, {}) for c in self.engine.sample(PROMPT, 4, seed=9)])
        assert set(fresh.versions[fresh.mask].tolist()) == {self.version}
        gap = (self.logprobs(self.version, fresh) - fresh.rollout_logprobs)[fresh.mask].abs().mean()
        assert float(gap) <= TOLERANCE
        return seen

    def logprobs(self, version: int, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.policies[self.of[version]](batch.input_ids, batch.mask, 1.0).logprobs

    def heal(self) -> None:
        """An ordinary update over a new channel, under way."""
        sender, running = self.open(), self.sampling()
        sender.send_weights()
        self.sent()
        self.check(running.result(300))


@pytest.fixture(scope="module")
def updates(live: Callable, tiny: Callable) -> Updates:
    models = [tiny(family="qwen2", tied=False, seed=seed) for seed in (0, 1)]
    return Updates(live(engine_config(models[0])), models)


@pytest.fixture(autouse=True)
def many_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout.weights.channel, "BUCKET_BYTES", 200_000)


class Faulty:
    """The engine's control calls, one of which goes wrong."""

    def __init__(self, live: Live, phase: str, fault: str) -> None:
        self.live, self.phase, self.fault = live, phase, fault
        self.refused: list[Exception] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.live, name)

    def stage_weights(self, version: int) -> None:
        self._call("begin", lambda v: self.live.stage_weights(v), version)
        if (self.phase, self.fault) == ("commit", "reorder"):
            self._try(lambda: self.live.wait(self.live.engine.finish_weight_update(version)))

    def finish_weight_update(self) -> None:
        self._call("commit", lambda v: self.live.wait(self.live.engine.finish_weight_update(v)), self.live.version)

    def _call(self, phase: str, call: Callable[[int], None], version: int) -> None:
        fault = self.fault if phase == self.phase else ""
        if fault == "drop":
            return
        if fault == "delay":
            time.sleep(0.5)
        if fault == "reorder" and phase == "begin":
            self._try(lambda: self.live.wait(self.live.engine.finish_weight_update(version)))
        call(version - 1 if fault == "corrupt" else version)
        if fault == "duplicate":
            self._try(lambda: call(version))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except UpdateFailed as error:
            self.refused.append(error)


# What an update with this fault comes to: it goes through, it is refused, or nobody was told to commit.
MATRIX = {
    ("begin", "drop"): "refused",
    ("begin", "delay"): "through",
    ("begin", "duplicate"): "through",
    ("begin", "reorder"): "through",
    ("begin", "corrupt"): "refused",
    ("tensors", "drop"): "refused",
    ("tensors", "delay"): "through",
    ("tensors", "duplicate"): "refused",
    ("tensors", "reorder"): "refused",
    ("tensors", "corrupt"): "refused",
    ("commit", "drop"): "silent",
    ("commit", "delay"): "through",
    ("commit", "duplicate"): "through",
    ("commit", "reorder"): "through",
    ("commit", "corrupt"): "refused",
}


IN_GATE = {("tensors", "delay"), ("tensors", "reorder"), ("begin", "duplicate")}
"""Next to what is lost and what is corrupt, of which every phase has a case in the gate."""


@pytest.mark.parametrize(
    ("phase", "fault"),
    nightly_unless(lambda phase, fault: fault in ("drop", "corrupt") or (phase, fault) in IN_GATE, MATRIX),
)
def test_no_fault_aborts_a_request_mixes_versions_or_stops_the_next_update(
    updates: Updates, phase: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = MATRIX[phase, fault]
    client = Faulty(updates.engine, phase, fault)
    if (phase, fault) == ("tensors", "corrupt"):
        # In shared memory nothing is on its way: both ends read the same bytes.
        monkeypatch.setattr(rollout.weights.sender, "reserve", lambda nbytes: "")
    sender = updates.open(client, timeout_s=12 if (phase, fault) == ("begin", "drop") else 60)
    if phase == "tensors":
        with_fault(sender.outbox, FAULTS[fault])
    running = updates.sampling()
    if outcome == "refused":
        with pytest.raises(UpdateFailed):
            sender.send_weights()
    else:
        sender.send_weights()
    if outcome == "through":
        updates.sent()
    if fault in ("duplicate", "reorder") and phase != "tensors":
        assert client.refused, "the call that came twice or too early was not refused"
    seen = updates.check(running.result(300))
    assert max(seen) <= updates.version
    updates.heal()


@pytest.mark.parametrize("phase", nightly_unless(lambda phase: phase == "tensors", ["begin", "tensors", "commit"]))
def test_an_engine_killed_in_an_update_is_told_at_once_as_lost(
    updates: Updates, live: Callable, tiny: Callable, phase: str
) -> None:
    if updates.engine.engine.llm.errored:  # the last test of the file, and the first of its phases ended the engine
        updates = Updates(live(engine_config(tiny(family="qwen2", tied=False, seed=0))), updates.models)
    engine = updates.engine

    def kill() -> None:
        engine.engine.llm.engine_core.resources.engine_manager.processes[0].kill()

    class Killing(Faulty):
        def _call(self, phase: str, call: Callable[[int], None], version: int) -> None:
            if phase == self.phase:
                kill()
            call(version)

    # Who waited for a deadline would wait until the test is ended from outside.
    sender = updates.open(Killing(engine, phase, "kill"), timeout_s=3600)
    if phase == "tensors":
        tell = sender.outbox._send_bucket

        def then_kill(*call: Any) -> None:
            tell(*call)
            kill()
            engine.engine.llm.engine_core.resources.engine_manager.processes[0].join(30)

        sender.outbox._send_bucket = then_kill
    running = updates.sampling()
    with pytest.raises((UpdateFailed, EngineLost)):
        sender.send_weights()
    with pytest.raises(EngineLost):
        running.result(300)
    with pytest.raises(EngineLost):
        engine.wait(engine.engine.alive())
