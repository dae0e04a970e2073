"""What the driver and a rank do with a step's tensors grows with its tokens, and no faster."""

import os
import pickle
import sys
from array import array
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rl.batch import collate, micro_batches, take, trajectory
from rl.types import Batch, Completion, Prompt, Step, Trajectory, columns
from trainer.cluster.process_env import ray_environment

LENGTH = 32


class Elements(TorchDispatchMode):
    """Counts the elements of all tensors that operations read and write."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = ("aten::slice", "aten::select", "aten::detach", "aten::alias")
        read = () if func._schema.name == "aten::index" else args  # of which it reads what it returns
        if func._schema.name not in views:
            self.seen += sum(x.numel() for x in (*read, out) if isinstance(x, torch.Tensor))
        return out


def step_of(groups: int) -> list[Trajectory]:
    return [
        Trajectory(
            group=group,
            episode=member,
            token_ids=[1] * LENGTH,
            mask=[False] * 8 + [True] * (LENGTH - 8),
            logprobs=[-1.0] * LENGTH,
            versions=[0] * LENGTH,
            reward=float(member),
        )
        for group in range(groups)
        for member in range(4)
    ]


def cut(batch: Batch) -> int:
    rows = torch.arange(len(batch.rewards))
    parts = micro_batches(batch, rows, ranks=1, budget=8 * LENGTH, share_prompts=False)[0]
    with Elements() as work:
        for part in parts:
            take(batch, part)
    return work.seen


@pytest.mark.parametrize("groups", [8, 32, 128])
def test_cutting_a_step_into_micro_batches_costs_the_same_for_every_token(groups):
    few, many = cut(collate(step_of(4))), cut(collate(step_of(4 * groups)))
    assert many == groups * few


def test_a_column_of_a_batch_is_what_its_rows_hold():
    rows = step_of(2)
    odd = replace(rows[0], token_ids=[7], mask=[True], logprobs=[float("nan")], versions=[3])
    batch = collate([*rows, odd])
    assert batch.input_ids.shape == (9, LENGTH)
    assert batch.input_ids[8].tolist() == [7] + [0] * (LENGTH - 1)
    assert batch.versions[:8].tolist() == [[*t.versions[1:]] for t in rows]
    assert batch.mask[:8].tolist() == [[*map(bool, t.mask[1:])] for t in rows]
    assert torch.equal(batch.rollout_logprobs[:8], torch.tensor([[*t.logprobs[1:]] for t in rows]))


def test_a_row_holds_13_bytes_a_token():
    prompt = Prompt(ordinal=0, token_ids=[70_000] * 1000, task={})
    reply = Completion(token_ids=[70_001] * 1000, logprobs=[-0.1] * 1000, versions=[9] * 1000, finish_reason="stop")
    t = trajectory(prompt, pickle.loads(pickle.dumps(reply)), 1.0, {})
    held = sum(sys.getsizeof(column) for column in (t.token_ids, t.mask, t.logprobs, t.versions))
    assert held < 13.5 * len(t.token_ids)


def test_a_completion_travels_as_arrays_and_arrives_as_it_was():
    sent = Completion(
        token_ids=[0, 151_935, 7], logprobs=[-0.125, float("-inf"), -2.5], versions=[3, 3, 4], finish_reason="stop"
    )
    come = pickle.loads(pickle.dumps(sent))
    assert all(isinstance(column, array) for column in (come.token_ids, come.logprobs, come.versions))
    assert replace(come, **{name: [*getattr(come, name)] for name in ("token_ids", "logprobs", "versions")}) == sent
    many = replace(sent, token_ids=[70_000] * 1000, logprobs=[-0.123] * 1000, versions=[5] * 1000)
    assert len(pickle.dumps(many)) < 13 * 1000


@pytest.mark.parametrize("kind", [Batch, Step])
def test_a_batch_travels_next_to_its_pickle_without_copies_and_arrives_as_it_was(kind: type[Batch]) -> None:
    batch = collate(step_of(4))
    old = torch.randn(batch.mask.shape)
    experts = torch.arange(batch.mask.numel() * 6, dtype=torch.int16).view(*batch.mask.shape, 3, 2)
    sent = kind(**columns(batch) | {"experts": experts, "old_logprobs": old.T.contiguous().T})
    beside: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(sent, protocol=5, buffer_callback=beside.append)
    assert len(stream) < 2000
    assert sum(b.raw().nbytes for b in beside) == sum(x.nbytes for x in columns(sent).values())
    come = pickle.loads(
        stream, buffers=[bytes(b.raw()) for b in beside]
    )  # bytes cannot be written to, as in Ray's store
    assert type(come) is kind
    assert columns(come).keys() == columns(sent).keys()
    for name, column in columns(sent).items():
        assert getattr(come, name).dtype == column.dtype
        assert torch.equal(getattr(come, name), column)
    come.mask[:] = False
    assert come.values is None


def test_the_answer_of_8_replies_of_4096_tokens_is_in_its_message() -> None:
    columns = {"token_ids": [70_001] * 4096, "logprobs": [-0.1] * 4096, "versions": [9] * 4096}
    group = [Completion(**columns, finish_reason="stop") for _ in range(8)]
    with ray_environment("cpu"):
        assert len(pickle.dumps(group)) < int(os.environ["RAY_max_direct_call_object_size"])  # noqa: SIM112 (Ray's name)
