"""The GPU's code paths in disguise: on CPU, with streams, kernels and vLLM's trainer replaced by ones that record."""

import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from vllm.distributed.weight_transfer import ipc_engine

import trainer.model.head as head
import trainer.model.product as product
from rl.config import Config, RolloutConfig
from rl.protocols import EngineLost
from rl.types import Data
from rl.weights import TensorMeta
from rollout.settings import engine_args, engine_env
from rollout.weights import vllm_sender
from trainer.cluster import engine_client
from trainer.cluster.stubs import recorded
from trainer.model import attention

LARGEST = {  # vocabulary and features of models whose embedding is larger than vLLM's own buffer of 1 GiB
    "Qwen2.5-7B": (152064, 3584),
    "Qwen3-8B": (151936, 4096),
    "Qwen2.5-14B": (152064, 5120),
}


def config(**rollout: Any) -> Config:
    return Config(
        name="x",
        model="m",
        data=lambda: Data(train=[]),
        reward=lambda reply: 0.0,
        rollout=RolloutConfig(**rollout),
    )


class Stream:
    """What was written on it, and whether that is complete."""

    def __init__(self) -> None:
        self.pending: set[int] = set()

    def synchronize(self) -> None:
        self.pending.clear()


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """CUDA streams that record. The first one is the learner's."""
    home = Stream()
    stack = [home]

    @contextmanager
    def entered(stream):
        stack.append(stream or stack[-1])
        yield
        stack.pop()

    kept: set[int] = set()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stack[-1])
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: kept.add(id(self)), raising=False)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    return SimpleNamespace(home=home, current=lambda: stack[-1], kept=kept)


class Gathering:
    """Weights that a stream writes when they are drawn, as ZeRO-3's gathers do."""

    def __init__(self, streams: SimpleNamespace) -> None:
        self.streams = streams
        self.wrote: dict[int, Stream] = {}

    def __iter__(self):
        for i in range(48):
            tensor = torch.full((10,), float(i))
            stream = self.streams.current()
            stream.pending.add(id(tensor))
            self.wrote[id(tensor)] = stream
            yield f"layers.{i}", tensor


@pytest.mark.parametrize("through_source", [True, False])
def test_vllm_packs_no_tensor_before_it_is_complete(streams, monkeypatch, through_source):
    from vllm.distributed.weight_transfer import packed_tensor

    from rollout.weights.vllm_sender import Source

    sides = [Stream(), Stream()]
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda *_: sides)
    weights = Gathering(streams)
    tensors = Source(weights, set()) if through_source else weights
    unordered, drawn_elsewhere, alive = [], [], []

    def read(item):
        tensor = item[1]
        alive.append(tensor)
        wrote = weights.wrote[id(tensor)]
        if wrote is not streams.current() and id(tensor) in wrote.pending:
            unordered.append(item[0])
        if wrote is not streams.home:
            drawn_elsewhere.append(item[0])
        if through_source:
            assert id(tensor) in streams.kept, "its memory may be given away while it is read"
        return tensor

    group = SimpleNamespace(broadcast=lambda tensor, src: None)
    packed_tensor.packed_nccl_broadcast_producer(iter(tensors), group, 0, read, buffer_size_bytes=150)
    assert len(alive) == 48
    assert unordered == []
    # Without `Source` the gathers run on vLLM's streams, which is what hangs and races.
    assert bool(drawn_elsewhere) is not through_source


@pytest.mark.parametrize("model", LARGEST)
def test_the_ipc_buffer_holds_the_largest_tensor(streams, monkeypatch, model):
    opened = []
    monkeypatch.setattr(vllm_sender.IPCSender, "trainer_init", lambda info, **_: opened.append(info) or object())
    metas = [
        TensorMeta(name="embed", dtype="bfloat16", shape=LARGEST[model]),
        TensorMeta(name="norm", dtype="bfloat16", shape=(8,)),
    ]
    weights = type("W", (), {"metadata": lambda self: metas, "__iter__": lambda self: iter(())})()
    vllm_sender.open_vllm_sender("ipc", weights=weights, expected=set(), client=None, rank=0, timeout_s=1.0)
    assert opened[0].packed_buffer_size_bytes >= 2 * LARGEST[model][0] * LARGEST[model][1] > 2**30


@pytest.mark.parametrize("phase", ["start_weight_update", "update_weights", "finish_weight_update", ""])
def test_over_ipc_from_two_ranks_a_failed_engine_stops_neither_the_ranks_nor_the_other_engine(monkeypatch, phase):
    """Two threads are the ranks of two shared GPUs: they meet for the handles of each of three parts of an update."""
    parts, ranks, gathered = 3, 2, {}
    meeting = threading.Barrier(ranks, timeout=60)
    calls = {0: [], 1: []}

    def gather(into, handles):
        gathered[threading.current_thread().name] = handles
        meeting.wait()
        into[:] = [gathered[f"rank {i}"] for i in range(ranks)]
        meeting.wait()

    for name, replacement in {
        "is_initialized": lambda: True,
        "get_world_size": lambda: ranks,
        "all_gather_object": gather,
        "barrier": meeting.wait,
    }.items():
        monkeypatch.setattr(torch.distributed, name, replacement)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(
        ipc_engine,
        "packed_ipc_producer",
        lambda gpu_uuid, **_: (
            SimpleNamespace(ipc_handle={gpu_uuid: (n,)}, names=["w"], shapes=[[1]], dtype_names=["f"], tensor_sizes=[4])
            for n in range(parts)
        ),
    )

    def engine(index):
        def ask(recorder):
            call = recorded(recorder)
            calls[index].append(call)
            if index == 1 and call.method == phase:
                return lambda: (_ for _ in ()).throw(EngineLost("engine 1 is gone"))
            return lambda: None

        return SimpleNamespace(ask=ask)

    monkeypatch.setattr(engine_client.ray, "get", lambda refs, timeout: [ref() for ref in refs])
    client = engine_client.EngineClient({i: engine(i) for i in range(2)}, 1, 60.0, patient=True)
    senders = []
    for rank in range(ranks):
        sender = vllm_sender.IPCSender.__new__(vllm_sender.IPCSender)
        sender.client, sender.source, sender.is_sender = client, [], rank == 0
        sender.packed, sender.packed_buffer_size_bytes, sender.gpu_uuid = True, 1, f"GPU {rank}"
        senders.append(sender)
    with ThreadPoolExecutor(ranks) as pool:

        def send(rank):
            threading.current_thread().name = f"rank {rank}"
            senders[rank].send_weights()

        zero, one = [pool.submit(send, rank) for rank in range(ranks)]
        assert one.exception(60) is None
        assert isinstance(zero.exception(60), EngineLost if phase else type(None))
    whole = ["start_weight_update", *["update_weights"] * parts, "finish_weight_update"]
    assert [call.method for call in calls[0]] == whole
    assert [call.method for call in calls[1]] == (whole[: whole.index(phase) + 1] if phase else whole)
    # Each engine got the handles of both GPUs.
    assert all(set(call.args[0]["ipc_handles"]) == {"GPU 0", "GPU 1"} for call in calls[0][1:-1])
    assert client.failed == {}, "the next update begins with every engine"


@pytest.mark.parametrize(("available", "disabled"), [(False, True), (True, True)])
def test_a_group_that_moves_nothing_is_an_error(available, disabled):
    from rollout.weights.group import check_usable

    check_usable(SimpleNamespace(available=True, disabled=False))
    with pytest.raises(RuntimeError, match="NCCL is not available to vLLM"):
        check_usable(SimpleNamespace(available=available, disabled=disabled))


def test_the_varlen_kernel_gets_only_arguments_that_this_torch_has():
    def of_torch_2_11(q, k, v, ends, ends_k, most, most_k, *, return_aux=None, scale=None, window_size=(-1, -1)): ...

    for kernel in (varlen_attn, of_torch_2_11):
        inspect.signature(kernel).bind(*range(7), scale=1.0, window_size=(-1, 0), **attention.grouped(kernel))
    assert attention.grouped(attention.varlen_attn) == attention.GROUPED


def test_all_layers_of_a_row_share_one_tensor_of_sequence_ends():
    device = torch.device("cpu")
    first, again = (attention.sequence_ends((3, 1, 2), device) for _ in range(2))
    assert first is again
    assert first.tolist() == [0, 3, 4, 6]
    assert first.dtype == torch.int32


@pytest.mark.parametrize(
    ("asked", "longest", "batched"), [(None, 1024, 8192), (None, 32768, 32768), (4096, 1024, 4096)]
)
def test_a_gpu_engine_computes_many_tokens_per_step_and_never_loads_flashinfer(asked, longest, batched):
    settings = config(max_num_batched_tokens=asked, max_model_len=longest)
    args = engine_args(settings, device="cuda", backend="ipc", model="m")
    assert args["max_num_batched_tokens"] == batched
    assert engine_env(device="cuda", backend="ipc", threads=1)["VLLM_USE_FLASHINFER_SAMPLER"] == "0"


@pytest.mark.parametrize(("reports", "top_k", "sent"), [(True, 0, 99), (True, 5, 5), (False, 0, 0)])
def test_an_engine_that_reports_kept_tokens_always_bounds_them(reports, top_k, sent):
    import asyncio

    from vllm import SamplingParams

    from rollout.engine import Engine

    seen = []

    class LLM:
        model_config = SimpleNamespace(return_sampling_mask=reports, get_vocab_size=lambda: 99)

        async def generate(self, prompt, params, request_id):
            seen.append(params.top_k)
            yield SimpleNamespace(finished=True, outputs=[SimpleNamespace(weight_versions=[])])

    async def ask():
        engine = Engine.__new__(Engine)
        engine.llm, engine.open, engine.requests, engine.version = LLM(), asyncio.Event(), 0, 0
        engine.slots = asyncio.Semaphore(1)
        engine.open.set()
        await engine.generate([1], SamplingParams(top_p=0.9, top_k=top_k))

    asyncio.run(ask())
    assert seen == [sent]


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head takes the path of tensor cores; their products are computed in fp32, exactly as they do."""
    monkeypatch.setattr(product, "on_tensor_cores", lambda *xs: all(x.dtype == torch.bfloat16 for x in xs))
    mm, addmm = torch.mm, torch.addmm

    def exact_mm(a, b, out_dtype=None, out=None):
        return mm(a.float(), b.float(), **({} if out is None else {"out": out}))

    def exact_addmm(c, a, b, out_dtype=None, out=None):
        return addmm(c, a.float(), b.float(), out=out)

    monkeypatch.setattr(torch, "mm", exact_mm)
    monkeypatch.setattr(torch, "addmm", exact_addmm)


def test_on_tensor_cores_the_head_has_the_values_and_gradients_of_fp32(tensor_cores):
    g = torch.Generator().manual_seed(0)
    lm_head = nn.Linear(64, 300, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(41, 64, generator=g).bfloat16().requires_grad_()
    targets = torch.randint(300, (41,), generator=g)
    up = torch.randn(2, 41, generator=g)
    said = head.LogprobHead(lm_head, fp32=True)(hidden, targets, 0.7)
    (up[0] * said[0] + up[1] * said[1]).sum().backward()
    exact = hidden.detach().double().requires_grad_(), lm_head.weight.detach().double().requires_grad_()
    log_p = (F.linear(*exact) / 0.7).log_softmax(-1)
    want = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (up[0] * want[0] + up[1] * want[1]).sum().backward()
    for ours, theirs in zip(said, want, strict=True):
        assert (ours - theirs).abs().max() < 1e-5
    for ours, theirs in zip((hidden.grad, lm_head.weight.grad), exact, strict=True):
        # bf16 at the end, and nothing worse before.
        assert (ours.double() - theirs.grad).norm() < 3e-3 * theirs.grad.norm()


def test_two_halves_hold_sixteen_bits_of_a_gradient():
    x = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    high, low = product.halves(x)
    assert high.dtype == low.dtype == torch.bfloat16
    assert ((high.double() + low.double() - x.double()).abs() <= 2.0**-16 * x.abs()).all()
