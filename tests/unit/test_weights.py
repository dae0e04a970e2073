"""Digests detect every fault, errors name the tensor, and buckets keep every bit."""

from types import SimpleNamespace

import pytest
import torch

import rl.weights
from rl.weights import TensorMeta, WeightManifest, check_complete, check_digests, digest
from rollout.weights.buckets import buckets, pack, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_a_digest_changes_with_every_single_bit(dtype):
    x = torch.arange(1, 7).to(dtype).view(2, 3)
    for i in range(6 * dtype.itemsize):
        for bit in range(8):
            y = x.clone()
            y.view(-1).view(torch.uint8)[i] ^= 1 << bit
            assert digest(y) != digest(x), f"bit {bit} of byte {i}"


def test_a_digest_changes_when_values_are_swapped_or_shifted():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    others = [x[[1, 0, 2, 3]], x[[3, 1, 2, 0]], x.roll(1), x.roll(-1), x.flip(0)]
    assert len({digest(t) for t in [x, *others]}) == 6


def test_the_position_of_the_only_value_changes_the_digest():
    # A plain sum of bits would not depend on the position.
    assert len({digest(torch.eye(4)[i]) for i in range(4)}) == 4


def test_a_digest_contains_dtype_and_shape():
    x = torch.zeros(2, 6)
    assert digest(x).startswith("float32[2, 6]:")
    assert len({digest(x), digest(x.view(6, 2)), digest(x.view(12)), digest(x.int()), digest(x.bfloat16())}) == 5
    same_bits = torch.tensor([1.5, -2.0])
    assert digest(same_bits) != digest(same_bits.view(torch.int32))


def test_negative_zero_and_the_payload_of_a_nan_change_the_digest():
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert nans.isnan().all()
    assert digest(nans[:1]) != digest(nans[1:])


def test_a_view_has_the_digest_of_its_contiguous_copy():
    x = torch.arange(24.0).view(4, 6)
    for view in (x.t(), x[:, ::2], x[1:, 3:]):
        assert not view.is_contiguous()
        assert digest(view) == digest(view.contiguous())
    assert digest(x.t()) != digest(x.view(6, 4))


def test_a_parameter_has_the_digest_of_its_data():
    assert digest(torch.nn.Parameter(torch.ones(3))) == digest(torch.ones(3))


def test_a_tensor_longer_than_one_chunk_is_covered_to_its_end():
    x = torch.zeros(rl.weights._CHUNK + 3, dtype=torch.int8)
    base = digest(x)
    ends = {base}
    for position in (0, rl.weights._CHUNK - 1, rl.weights._CHUNK, rl.weights._CHUNK + 2):
        x[position] = 1
        ends.add(digest(x))
        x[position] = 0
    assert len(ends) == 5, "chunks must not be interchangeable either: positions 0 and _CHUNK share a multiplier"
    assert digest(x) == base


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_pieces_of_a_chunk_give_the_digest_of_the_whole_chunk(monkeypatch, dtype):
    x = torch.randn(2 * rl.weights._CHUNK + 5).mul(50).to(dtype)
    in_pieces = digest(x)
    monkeypatch.setattr(rl.weights, "_PIECE", {})
    assert digest(x) == in_pieces


def test_an_incomplete_update_is_refused_with_both_lists():
    check_complete({"a", "b"}, {"a", "b"}, "engine 0")
    with pytest.raises(
        ValueError, match=r"engine 3 loads: 1 missing \(first: \['qkv'\]\), 0 unknown.*nothing was sent"
    ):
        check_complete({"norm"}, {"norm", "qkv"}, "engine 3")
    with pytest.raises(ValueError, match=r"0 missing.*2 unknown \(first: \['lora', 'value'\]\)"):
        check_complete({"norm", "value", "lora"}, {"norm"}, "engine 3")


def test_a_digest_that_differs_or_is_missing_names_the_tensor():
    sent = {"a.weight": "float32[1]:01", "b.weight": "float32[1]:02"}
    check_digests(sent, {**sent, "more": "x"}, "engine 0")
    with pytest.raises(RuntimeError, match=r"'b\.weight' arrived at engine 1 as float32\[1\]:ff, but float32\[1\]:02"):
        check_digests(sent, {**sent, "b.weight": "float32[1]:ff"}, "engine 1")
    with pytest.raises(RuntimeError, match=r"'b\.weight' arrived at engine 1 as nothing"):
        check_digests(sent, {"a.weight": "float32[1]:01"}, "engine 1")


def test_a_manifest_counts_the_bytes_of_one_receiver():
    tensors = (
        TensorMeta(name="a", dtype="bfloat16", shape=(3, 5)),
        TensorMeta(name="b", dtype="float32", shape=()),
    )
    assert WeightManifest(version=1, tensors=tensors, digests={}).total_bytes() == 30 + 4


def tensors():
    """Mixed dtypes, lengths that are not a multiple of the alignment, a scalar, an empty tensor, a view."""
    g = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(7, 5, generator=g).bfloat16(),
        "norm": torch.randn(3, generator=g),
        "scale": torch.tensor(0.5, dtype=torch.float64),
        "ids": torch.randint(-128, 128, (13,), generator=g, dtype=torch.int8),
        "none": torch.empty(0, 4),
        "turned": torch.randn(4, 6, generator=g).t(),
        "large": torch.randn(100, generator=g),
        "nan": torch.tensor([float("nan"), -0.0]),
    }


def metas(named):
    return [(name, t.dtype, tuple(t.shape)) for name, t in named.items()]


@pytest.mark.parametrize("limit", [1, 64, 200, 1 << 20])
def test_tensors_packed_into_buckets_keep_every_bit(limit):
    named = tensors()
    source, received = iter(named.items()), {}
    for bucket in buckets(metas(named), limit):
        received |= dict(unpack(bucket, pack(bucket, source).clone()))
    assert list(received) == list(named)
    assert {n: digest(t) for n, t in received.items()} == {n: digest(t) for n, t in named.items()}


def test_a_bucket_keeps_its_limit_and_a_larger_tensor_gets_its_own():
    cut = list(buckets(metas(tensors()), 200))
    names = [[meta[0] for meta, _ in items] for items, _ in cut]
    assert ["large"] in names  # 400 bytes
    assert all(size <= 200 for (_, size), held in zip(cut, names, strict=True) if held != ["large"])
    assert len(cut) < len(tensors()), "small tensors share a bucket"


@pytest.mark.slow
@pytest.mark.parametrize("refused_after", [0, 2, None])
def test_a_sender_gathers_every_tensor_even_when_an_engine_refuses(refused_after):
    from rollout.weights.vllm_sender import DrainingSender, Source

    gathered = []

    class Weights:
        def __iter__(self):
            for name in "abcd":
                gathered.append(name)
                yield name, torch.zeros(1)

    source = Source(Weights(), set())

    class Sender:
        def send_weights(self):
            if refused_after is None:
                assert len(list(source)) == 4
                return
            for _ in zip(range(refused_after), source, strict=False):
                pass
            raise ValueError("refused")

    sender = DrainingSender(Sender(), source)
    for _ in range(2):
        gathered.clear()
        if refused_after is None:
            sender.send_weights()
        else:
            with pytest.raises(ValueError, match="refused"):
                sender.send_weights()
        assert gathered == list("abcd")


class IntactGroup:
    """Of NCCL, and nobody has aborted it."""

    available, disabled = True, False

    @property
    def group(self):
        return SimpleNamespace(store=SimpleNamespace(check=lambda keys: False))


@pytest.mark.parametrize("digesting", [True, False])
@pytest.mark.parametrize("name", ["NCCLEngine", "IPCEngine"])
def test_a_gpu_engine_digests_what_it_loads_and_gets_its_model_back(monkeypatch, name, digesting):
    from rollout.weights import vllm_receive

    class Model(torch.nn.Module):
        def load_weights(self, weights):
            self.loaded = dict(weights)

    engine_class = getattr(vllm_receive, name)
    vllms = engine_class.__base__
    monkeypatch.setattr(vllms, "start_weight_update", lambda self: None)
    monkeypatch.setattr(vllms, "receive_weights", lambda self, update: self.model.load_weights(iter(update)))
    engine, model = object.__new__(engine_class), Model()
    engine.model, engine.digesting = model, digesting
    engine.model_update_group, engine.timeout_s = IntactGroup(), 10.0
    engine.start_weight_update()
    engine.receive_weights([("w", torch.ones(3))])
    assert model.loaded["w"].tolist() == [1.0, 1.0, 1.0]
    assert engine.digests == ({"w": digest(torch.ones(3))} if digesting else {})
    assert engine.model is model


@pytest.mark.parametrize(
    "yields",
    [("other", torch.zeros(3)), ("w", torch.zeros(3).bfloat16()), ("w", torch.zeros(1, 3)), ("w", torch.zeros(4))],
    ids=["name", "dtype", "shape", "length"],
)
def test_a_tensor_that_was_not_announced_is_refused(yields):
    (bucket,) = buckets([("w", torch.float32, (3,))], 100)
    with pytest.raises(ValueError, match=r"announced \('w', torch.float32, \(3,\)\) but yields \('(w|other)'"):
        pack(bucket, iter([yields]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flipping_a_bit_moves_half_the_weights_by_its_worth_and_again_restores_every_bit(dtype: torch.dtype) -> None:
    from trainer.learner.weights import LearnerWeights

    torch.manual_seed(0)
    model = torch.nn.Linear(200, 50, dtype=dtype)
    before = [p.detach().clone() for p in model.parameters()]
    weights = LearnerWeights(model, sharded=False)
    weights.flip(6)
    moved = (model.weight / before[0] - 1).detach().float().abs()
    assert 0.45 < float((moved > 0).float().mean()) < 0.55
    # A mantissa in [1, 2) that changes by 2^-6 moves its value by half to all of that.
    assert float(moved[moved > 0].min()) > 2**-7.1
    assert float(moved.max()) < 2**-5.9
    weights.flip(6)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
