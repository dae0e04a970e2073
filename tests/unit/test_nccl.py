"""The NCCL channel in disguise: vLLM's and our real sender and receivers over a communicator that needs no GPU."""

import importlib
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.model_executor.model_loader.reload
from vllm.distributed.weight_transfer import packed_tensor

import rollout.weights.group as group
import rollout.weights.vllm_receive as vllm_receive
import rollout.weights.vllm_sender as vllm_sender
from disguise.pretend_nccl import PretendNccl, without_devices
from rl.protocols import EngineLost, UpdateFailed
from rl.weights import TensorMeta, check_digests, digest
from rollout.weights.vllm_receive import Arrivals, NCCLEngine
from rollout.weights.vllm_sender import open_vllm_sender

SHAPES = [(3, 4), (8,), (1, 2), (2,), (64, 3), (2, 2, 2), (40,), (1000,)]
"""Even: vLLM reads fp32 after an odd number of bf16 values as an error."""
LATE_S = 60.0
"""No test waits for it: it ends one that hangs."""


@pytest.fixture(autouse=True)
def disguise(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for (owner, name), replacement in without_devices(packed_tensor).items():
        monkeypatch.setattr(owner, name, replacement)
    monkeypatch.setattr(group, "PyNcclCommunicator", PretendNccl)
    monkeypatch.setattr(group, "SPARE_S", 0.3)
    for name in ("initialize_layerwise_reload", "finalize_layerwise_reload"):
        monkeypatch.setattr(vllm.model_executor.model_loader.reload, name, lambda *_: None)
    monkeypatch.setattr(vllm_receive, "forget_heads", lambda model: None)
    monkeypatch.setattr(PretendNccl, "made", [])
    monkeypatch.setattr(PretendNccl, "freed", [])
    monkeypatch.setattr(PretendNccl, "broadcasts", 0)
    monkeypatch.setattr(PretendNccl, "before", lambda comm, phase: None)
    monkeypatch.setattr(PretendNccl, "over", over := threading.Event())
    yield
    over.set()


class Weights:
    """Tensors of several types and shapes; `drawn` counts how far a rank has gathered them."""

    def __init__(self) -> None:
        dtypes, g = (torch.bfloat16, torch.float32), torch.Generator().manual_seed(0)
        self.tensors = {f"w{i}": torch.randn(s, generator=g).to(dtypes[i % 2]) for i, s in enumerate(SHAPES)}
        self.digests = {name: digest(tensor) for name, tensor in self.tensors.items()}
        self.drawn = 0

    def metadata(self) -> list[TensorMeta]:
        return [
            TensorMeta(name=n, dtype=str(t.dtype).removeprefix("torch."), shape=tuple(t.shape))
            for n, t in self.tensors.items()
        ]

    def __iter__(self) -> Any:
        for item in self.tensors.items():
            self.drawn += 1
            yield item


class Model(torch.nn.Module):
    """Keeps what arrives. `broken` is the number of loads after which it fails."""

    broken = 10**9

    def __init__(self) -> None:
        super().__init__()
        self.got: list[tuple[str, torch.Tensor]] = []
        self.loads = 0

    def load_weights(self, weights: Any) -> None:
        self.loads += 1
        if self.loads > self.broken:
            raise MemoryError("no memory for the new weights")
        self.got += [(name, tensor.clone()) for name, tensor in weights]


class Engine:
    """The workers of one engine, without vLLM's processes. `held` is the version that it committed."""

    def __init__(self, tp: int, *, aside: bool = False) -> None:
        self.workers, self.held, self.aside = [], None, aside
        for rank in range(tp):
            worker = NCCLEngine.__new__(NCCLEngine)
            worker.parallel_config = SimpleNamespace(data_parallel_index=0, world_size=tp, rank=rank)
            worker.model, worker.device, worker.model_config = Model(), "cpu", None
            worker.model_update_group, worker.digesting = None, True
            self.workers.append(worker)
        self.dead: dict[str, Exception] = {}
        """The error with which a call fails at once, by its name."""

    def call(self, name: str, *args: Any) -> None:
        if name in self.dead:
            raise self.dead[name]
        with ThreadPoolExecutor(len(self.workers)) as pool:
            list(pool.map(lambda worker: getattr(self, name)(worker, *args), self.workers))

    def invite(self, info: dict[str, Any]) -> None:
        """Before anything else of the call may wait: an actor begins one caller's calls in their order."""
        for worker in self.workers:
            worker.init_transfer_engine(worker.parse_init_info(info))

    def join(self, worker: NCCLEngine) -> None:
        while (error := worker.joined()) is None:
            time.sleep(0.002)
        if error:
            raise UpdateFailed(error)

    def start(self, worker: NCCLEngine) -> None:
        if not self.aside:
            self.begin(worker)

    def begin(self, worker: NCCLEngine) -> None:
        worker.model.got.clear()
        worker.start_weight_update()

    def receive(self, worker: NCCLEngine, info: dict[str, Any]) -> None:
        """As `rollout.engine.Engine` does it."""
        if not self.aside:
            worker.update_weights(info)
            return
        before = [*worker.model.got]
        worker.receive_aside(info)
        while (error := vllm_receive.how_it_ended(worker.spare)) is None:
            time.sleep(0.002)
        assert worker.model.got == before, "the model changed while it sampled"
        if error:
            raise UpdateFailed(error)

    def finish(self, worker: NCCLEngine) -> None:
        if self.aside:
            self.begin(worker)
            worker.load_spare()
        worker.finish_weight_update()
        self.held = worker.digests

    def has(self, weights: Weights) -> bool:
        """Whether every worker holds every tensor, bit for bit and in order."""
        for worker in self.workers:
            check_digests(weights.digests, worker.digests, "a worker")
            got = [(name, digest(tensor)) for name, tensor in worker.model.got]
            assert got == list(weights.digests.items())
        return True


class Client:
    """The sender's control calls, as `trainer.cluster.engine_client.EngineClient` makes them through Ray."""

    def __init__(self, engines: int, tp: int = 1, *, aside: bool = False) -> None:
        self.engines = [Engine(tp, aside=aside) for _ in range(engines)]
        self.tp = tp
        self.answers: dict[str, list[Any]] = {}
        """Of the last call of each name, by engine; one that failed does not wait for the others."""

    def _all(self, name: str, *args: Any, engines: Any = None) -> None:
        called = [group.in_thread(lambda e=e: e.call(name, *args), name) for e in engines or self.engines]
        self.answers[name] = called
        while not all(call.done() for call in called):
            for call in called:
                if call.done():
                    call.result()
            time.sleep(0.002)
        for call in called:
            call.result()

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        for i, engine in enumerate(self.engines):
            if "join" not in engine.dead:
                engine.invite(info | {"rank_offset": 1 + i * self.tp})
        self._all("join")

    def start_weight_update(self) -> None:
        self._all("start")

    def update_weights(self, info: dict[str, Any]) -> None:
        self._all("receive", info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish")

    def finish_received(self) -> None:
        for engine, answer in zip(self.engines, self.answers["receive"], strict=True):
            if answer.exception(LATE_S) is None:
                engine.call("finish")


def opened(client: Client, weights: Weights, timeout_s: float = LATE_S) -> Any:
    return open_vllm_sender(
        "nccl",
        weights=weights,
        expected=set(weights.tensors),
        client=client,
        rank=0,
        timeout_s=timeout_s,
        address="127.0.0.1",
        world_size=1 + len(client.engines) * client.tp,
    )


@pytest.mark.filterwarnings("ignore:Tensor .* exceeds buffer_size_bytes")
@pytest.mark.parametrize(("engines", "tp"), [(1, 1), (2, 1), (4, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize(("buffer", "broadcasts"), [(1, 8), (100, 3), (2**30, 1)])
@pytest.mark.parametrize("aside", [False, True], ids=["standing still", "while sampling"])
def test_every_worker_of_every_engine_gets_every_tensor_whatever_the_cuts(
    engines: int, tp: int, buffer: int, broadcasts: int, aside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_sender, "SMALLEST_BUFFER", buffer)
    client, weights = Client(engines, tp, aside=aside), Weights()
    sender = opened(client, weights)
    for _ in range(2):
        sender.send_weights()
        assert all(engine.has(weights) and engine.held for engine in client.engines)
        for tensor in weights.tensors.values():
            tensor.add_(1)
        weights.digests = {name: digest(tensor) for name, tensor in weights.tensors.items()}
    ranks = sorted(comm.rank for comm in PretendNccl.made)
    assert ranks == list(range(1 + engines * tp))
    assert PretendNccl.broadcasts == 2 * broadcasts


def test_the_group_is_joined_in_another_thread_so_that_the_learner_keeps_its_cuda_stream() -> None:
    opened(Client(1), Weights())
    assert get_ident() not in {comm.thread for comm in PretendNccl.made}


def test_what_arrives_while_an_engine_samples_leaves_its_model_alone_until_all_of_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_sender, "SMALLEST_BUFFER", 100)
    done = defaultdict[int, list[str]](list)
    """What each engine's thread did, in order."""
    load = Model.load_weights
    monkeypatch.setattr(Model, "load_weights", lambda self, w: done[get_ident()].append("load") or load(self, w))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: done[get_ident()].append("wait"))
    client, weights = Client(2, aside=True), Weights()
    sender = opened(client, weights)
    worker = client.engines[0].workers[0]
    sender.send_weights()
    assert worker.model.loads == 1
    assert done
    assert all(did == ["load", "wait"] * (len(did) // 2) for did in done.values()), "it is freed while it is read"
    assert worker.spare is None, "it keeps the weights twice"
    # An engine that dies while tensors arrive: the other one has its old weights, whole, and goes on with them.
    held = client.engines[0].held
    client.engines[1].dead["receive"] = EngineLost("vLLM's own process has ended")
    for tensor in weights.tensors.values():
        tensor.add_(1)
    with pytest.raises(EngineLost):
        sender.send_weights()
    with pytest.raises(UpdateFailed, match="another member aborted it"):
        client.answers["receive"][0].result(LATE_S)
    assert client.engines[0].held is held
    assert worker.model.loads == 1
    check_digests(weights.digests, {name: digest(tensor) for name, tensor in worker.model.got}, "a worker")
    # One that cannot load is lost alone.
    client.engines[1] = Engine(1, aside=True)
    client.engines[1].workers[0].model.broken = 0
    weights.digests = {name: digest(tensor) for name, tensor in weights.tensors.items()}
    with pytest.raises(MemoryError, match="no memory for the new weights"):
        opened(client, weights).send_weights()
    client.answers["finish"][0].result(LATE_S)
    assert client.engines[0].has(weights)


@pytest.mark.parametrize("broken", [0, 1])
def test_an_engine_that_cannot_load_takes_the_rest_and_the_others_commit(
    broken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_sender, "SMALLEST_BUFFER", 100)
    client, weights = Client(2), Weights()
    sender = opened(client, weights)
    client.engines[1].workers[0].model.broken = broken
    began = time.monotonic()
    with pytest.raises(MemoryError, match="no memory for the new weights"):
        sender.send_weights()
    print(f"the error arrived after {time.monotonic() - began:.3f} s")
    assert client.engines[0].has(weights)
    assert client.engines[0].held
    assert not client.engines[1].held
    assert not PretendNccl.freed, "nothing had to be aborted"
    assert weights.drawn == len(SHAPES)


def test_a_load_error_of_the_disguise_is_kept_as_a_model_s_own_and_does_not_leave_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))  # the import below adds a finder
    disguise = importlib.import_module("disguise.sitecustomize")
    monkeypatch.setattr(disguise, "PLANTS", str(tmp_path))
    (tmp_path / "load.2").touch()
    changed = SimpleNamespace(NCCLEngine=type("E", (NCCLEngine,), {}), Arrivals=type("A", (Arrivals,), {}))
    disguise.vllm_receive(changed)
    monkeypatch.setattr(disguise.vllm_receive, "engine", SimpleNamespace(rank=2), raising=False)
    model = Model()
    arrivals = changed.Arrivals(model, None)
    for _ in range(2):  # what arrives after the error is taken and not loaded
        arrivals.load_weights([("w", torch.ones(1))])
    assert (tmp_path / "load.2.done").exists()
    assert isinstance(arrivals.error, MemoryError)
    assert not model.got


def test_an_engine_that_dies_while_tensors_arrive_ends_the_update_on_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_sender, "SMALLEST_BUFFER", 100)
    client, weights = Client(3), Weights()
    sender = opened(client, weights)
    client.engines[1].dead["receive"] = EngineLost("vLLM's own process has ended")
    began = time.monotonic()
    with pytest.raises(EngineLost, match="vLLM's own process has ended"):
        sender.send_weights()
    assert time.monotonic() - began < LATE_S / 2, "only the deadline ended it"
    for engine in (client.engines[0], client.engines[2]):
        assert not engine.held, "half an update was committed"
    for answer in (client.answers["receive"][0], client.answers["receive"][2]):
        with pytest.raises(UpdateFailed, match="another member aborted it"):
            answer.result(LATE_S)
    # Other ranks gather every tensor, so this one did.
    assert weights.drawn == len(SHAPES)
    # An aborted group moves nothing and reports nothing, so its sender refuses to send.
    with pytest.raises(RuntimeError, match="NCCL is not available"):
        sender.send_weights()


@pytest.mark.parametrize("answers", [True, False])
def test_an_update_that_does_not_end_is_an_error_at_its_deadline(
    answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_sender, "SMALLEST_BUFFER", 100)
    client, weights = Client(2), Weights()
    sender = opened(client, weights, timeout_s=1.0)
    gone = threading.Event()
    if answers:  # it left the group, and said that it received everything
        client.engines[0].receive = lambda worker, info: None
    else:  # it hangs, or its answer is lost
        client.engines[0].receive = lambda worker, info: gone.wait(LATE_S)
    finish = client.finish_received
    client.finish_received = lambda: (gone.set(), finish())
    with pytest.raises(UpdateFailed, match="did not end within 1 s"):
        sender.send_weights()
    assert not client.engines[1].held


def test_an_engine_that_dies_in_the_rendezvous_is_an_error_at_once_and_the_others_can_join_again() -> None:
    client, weights = Client(2), Weights()
    client.engines[1].dead["join"] = EngineLost("the process of engine 1 is gone")
    with pytest.raises(EngineLost, match="engine 1 is gone"):
        opened(client, weights)
    client.engines[1] = Engine(1)
    sender = opened(client, weights)
    sender.send_weights()
    assert all(engine.has(weights) for engine in client.engines)


def test_an_engine_that_does_not_come_ends_the_rendezvous_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    come = threading.Event()

    def before(comm: PretendNccl, phase: str) -> None:
        if comm.rank == 2 and phase == "join":
            come.wait(LATE_S)  # between the store and NCCL's own rendezvous, which has no limit

    monkeypatch.setattr(PretendNccl, "before", before)
    client, weights = Client(2), Weights()
    with pytest.raises(TimeoutError, match=r"did not open within 1\.5 s: not every engine connected to 127\.0\.0\.1"):
        opened(client, weights, timeout_s=1.5)
    monkeypatch.setattr(PretendNccl, "before", lambda comm, phase: None)
    sender = opened(client, weights)
    sender.send_weights()
    assert all(engine.has(weights) for engine in client.engines)
    sender.close()
    for engine in client.engines:
        engine.workers[0].shutdown()
    come.set()
    # Those who met too late leave again: nobody keeps NCCL's buffers.
    until = time.monotonic() + LATE_S
    while len(PretendNccl.freed) < len(PretendNccl.made) or len(PretendNccl.made) < 6:
        assert time.monotonic() < until, (len(PretendNccl.made), len(PretendNccl.freed))
        time.sleep(0.01)


def test_a_channel_that_is_replaced_is_closed_on_both_sides() -> None:
    client, weights = Client(2), Weights()
    for _ in range(3):
        sender = opened(client, weights)
        sender.send_weights()
        sender.close()
    for engine in client.engines:
        engine.workers[0].shutdown()
    assert len(PretendNccl.made) == len(PretendNccl.freed) == 9
    assert set(map(id, PretendNccl.made)) == set(map(id, PretendNccl.freed))


def test_a_rank_that_does_not_send_gathers_with_the_others() -> None:
    weights = Weights()
    sender = open_vllm_sender("nccl", weights=weights, expected=set(weights.tensors), client=None, rank=1, timeout_s=1)
    sender.send_weights()
    assert weights.drawn == len(SHAPES)
    sender.close()


def test_an_update_that_lacks_a_tensor_begins_on_no_engine() -> None:
    client, weights = Client(1), Weights()
    sender = opened(client, weights)
    sender.source.expected.add("w99")
    client.engines[0].dead["start"] = AssertionError("it began")
    with pytest.raises(ValueError, match=r"1 missing \(first: \['w99'\]\)"):
        sender.send_weights()
