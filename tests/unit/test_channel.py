"""The weight channel over real sockets and real shared memory: an update arrives completely or is refused."""

import os
from itertools import islice
from threading import Timer

import pytest
import torch

import rollout.weights.channel
import rollout.weights.outbox
from density import density
from rl.protocols import UpdateFailed
from rl.weights import digest
from rollout.weights import sparse
from wire import FAULTS, Receiver, Wire, steps, with_fault

REFUSED = ("drop", "duplicate", "reorder")


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    # Several buckets from small tensors.
    monkeypatch.setattr(rollout.weights.channel, "BUCKET_BYTES", 40_000)


def holds(receiver, tensors, version):
    return receiver.version == version and {n: digest(t) for n, t in receiver.tensors.items()} == {
        n: digest(t) for n, t in tensors.items()
    }


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_every_update_arrives_bit_for_bit_at_every_receiver(shared, count):
    receivers = [Receiver() for _ in range(count)]
    first, *rest = islice(steps(0), 4)
    wire = Wire(first, receivers, shared)
    assert wire.outbox.shared == shared
    for version, tensors in enumerate([first, *rest]):
        assert wire.send(tensors, version) == [""] * count
        assert all(holds(r, tensors, version) for r in receivers)


def names() -> set[str]:
    """Names of the files that this process has in shared memory."""
    return {path.name for path in rollout.weights.channel.SHARED.glob(f"unison-{os.getpid()}-*")}


def test_a_reserved_file_in_shared_memory_can_be_unlinked():
    before = names()
    path = rollout.weights.channel.reserve(4096)
    assert names() - before == {os.path.basename(path)}
    os.unlink(path)


def test_where_shared_memory_has_no_room_the_update_goes_over_gloo(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = names()
    assert rollout.weights.channel.reserve(4096) == ""
    assert names() == before


def test_only_changes_are_sent_and_all_values_at_every_anchor(monkeypatch):
    monkeypatch.setattr(rollout.weights.outbox, "ANCHOR_EVERY", 4)
    receiver = Receiver()
    updates = list(islice(steps(0, lr=1e-5), 10))
    wire = Wire(updates[0], [receiver], shared=False)
    sizes = []
    for version, tensors in enumerate(updates):
        wire.send(tensors, version)
        sizes.append(wire.outbox.sent_bytes)
        assert holds(receiver, tensors, version)
    whole = wire.outbox.nbytes
    assert [size == whole for size in sizes] == [version % 4 == 0 for version in range(10)]
    assert max(size for size in sizes if size != whole) < whole / 4


def test_an_update_that_changes_every_value_is_sent_as_all_values():
    receiver = Receiver()
    first = next(steps(0))
    wire = Wire(first, [receiver], shared=False)
    wire.send(first, 0)
    noise = {n: torch.randint(0, 2**15, t.shape, dtype=torch.int16).view(torch.bfloat16) for n, t in first.items()}
    wire.send(noise, 1)
    assert wire.outbox.sent_bytes == wire.outbox.nbytes
    assert holds(receiver, noise, 1)


@pytest.mark.parametrize("fault", REFUSED)
@pytest.mark.parametrize("shared", [True, False])
def test_a_faulty_update_is_refused_by_name_and_changes_nothing(fault, shared):
    receiver, (old, new) = Receiver(), islice(steps(0), 2)
    wire = Wire(old, [receiver], shared)
    wire.send(old, 0)
    mend = with_fault(wire.outbox, FAULTS[fault])
    with pytest.raises(UpdateFailed, match=r"weight update 1 was refused: engine worker 0: bucket .*from "):
        wire.send(new, 1)
    assert holds(receiver, old, 0)
    mend()
    again = Wire(new, [receiver], shared)
    again.send(new, 1)
    assert holds(receiver, new, 1)


def test_bytes_that_change_in_transit_are_detected():
    receiver, (old, new) = Receiver(), islice(steps(0), 2)
    wire = Wire(old, [receiver], shared=False)
    wire.send(old, 0)
    wire.outbox.held = None  # all values are sent then
    with_fault(wire.outbox, FAULTS["corrupt"])
    with pytest.raises(UpdateFailed, match=r"bucket 0 \(from embed\) changed in transit"):
        wire.send(new, 1)
    assert holds(receiver, old, 0)


def test_a_receiver_that_fails_reports_the_error_to_the_sender(monkeypatch):
    receivers, (old, new) = [Receiver(), Receiver()], islice(steps(0), 2)
    wire = Wire(old, receivers, shared=True)
    wire.send(old, 0)

    def broken(named):
        raise KeyError("model.layers.9.norm")

    monkeypatch.setattr(receivers[1], "_take", broken)
    with pytest.raises(UpdateFailed, match=r"engine worker 1: bucket from embed: KeyError: 'model.layers.9.norm'"):
        wire.send(new, 1)
    assert holds(receivers[1], old, 0)


def test_changes_from_another_version_than_the_held_one_are_refused():
    receiver, (old, new) = Receiver(), islice(steps(0), 2)
    wire = Wire(old, [receiver], shared=False)
    wire.send(old, 0)
    receiver.inbox.held = -5
    with pytest.raises(UpdateFailed, match="changes version 0, but this engine holds -5"):
        wire.send(new, 1)
    assert holds(receiver, old, 0)


def test_a_bucket_of_another_version_than_the_announced_one_is_refused():
    receiver, (old, new) = Receiver(), islice(steps(0), 2)
    wire = Wire(old, [receiver], shared=True)
    wire.send(old, 0)
    tell = wire.outbox._send_bucket

    def late(*call):
        wire.outbox.version = 0
        tell(*call)

    wire.outbox._send_bucket = late
    with pytest.raises(UpdateFailed, match="bucket 0 is of version 0, but version 1 was announced"):
        wire.send(new, 1)
    assert holds(receiver, old, 0)


@pytest.mark.slow
def test_the_wait_for_a_lost_or_late_receiver_ends_at_the_deadline():
    receiver, (old, new) = Receiver(), islice(steps(0), 2)
    wire = Wire(old, [receiver], shared=True, timeout_s=5)
    wire.send(old, 0)
    receiver.receive = lambda version: None
    with pytest.raises(RuntimeError, match=r"(?i)timed out|timeout"):
        wire.send(new, 1)


def test_receivers_wait_for_a_slow_sender():
    receiver, (old, new) = Receiver(), islice(steps(0), 2)
    wire = Wire(old, [receiver], shared=True)
    wire.send(old, 0)

    def slowly():
        for n, item in enumerate(new.items()):
            if n == 2:
                done = []
                timer = Timer(1.0, done.append, [1])
                timer.start()
                timer.join()
            yield item

    class Slow(dict):
        def items(self):
            return slowly()

    wire.send(Slow(), 1)
    assert holds(receiver, new, 1)


@pytest.mark.slow
def test_three_hundred_real_updates_with_faults_between_are_bit_exact_and_near_their_entropy():
    receiver, wire, refused, version = Receiver(), None, 0, 0
    faults, payload, bound = [FAULTS[name] for name in (*REFUSED, "corrupt")], 0, 0.0
    before = None
    for n, tensors in enumerate(islice(steps(1, lr=1e-5), 320)):
        wire = wire or Wire(tensors, [receiver], shared=False)
        if n % 20 == 10:
            mend = with_fault(wire.outbox, faults[n // 20 % 4])
            with pytest.raises(UpdateFailed):
                wire.send(tensors, n)
            mend()
            assert receiver.version == version
            refused += 1
            wire = Wire(tensors, [receiver], shared=False)
        wire.send(tensors, n)
        assert holds(receiver, tensors, n)
        version = n
        flat = torch.cat([t.reshape(-1) for t in tensors.values()]).view(torch.int16)
        if before is not None and wire.outbox.sent_bytes < wire.outbox.nbytes:
            payload += wire.outbox.sent_bytes
            bound += density(before, flat).bound
        before = flat
    assert refused == 16
    # Bucket headers of a few bytes are a tenth of this small update; in a real one their share is negligible.
    print(f"payload {payload / bound:.3f} times the entropy bound")
    assert payload <= 1.5 * bound


@pytest.mark.parametrize("share", [0.0, 1e-5, 1e-3, 0.02, 0.15, 0.6, 1.0])
def test_sparse_coding_is_lossless_and_near_the_entropy_at_every_density(share):
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(1_000_003, generator=generator).bfloat16().view(torch.int16)
    new = old.clone()
    where = torch.rand(old.shape, generator=generator) < share
    new[where] += torch.randint(0, 2, (int(where.sum()),), generator=generator, dtype=torch.int16) * 2 - 1
    payload, image = sparse.encode(old, new), old.clone()
    assert sparse.apply(payload, image) == int(where.sum())
    assert torch.equal(image, new)
    there = density(old, new)
    assert there.changed == pytest.approx(float(where.float().mean()))
    # With few changes the fixed header dominates; if all values change, a Huffman code spends one bit on each gap.
    if 1e-4 < share < 1:
        assert payload.numel() <= 1.1 * there.bound


def test_sparse_coding_keeps_the_bits_of_every_value():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for shift in (1, 255, 256, 20_000):
        new = every.roll(shift)
        image = every.clone()
        sparse.apply(sparse.encode(every, new), image)
        assert torch.equal(image, new)


def test_sparse_coding_refuses_other_types_and_sizes():
    with pytest.raises(ValueError, match="flat int16"):
        sparse.encode(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="sparse update of 4 values cannot change 3"):
        sparse.apply(
            sparse.encode(torch.zeros(4, dtype=torch.int16), torch.ones(4, dtype=torch.int16)),
            torch.zeros(3, dtype=torch.int16),
        )
