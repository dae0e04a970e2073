"""The witness gives the model's own numbers, and a trainer that errs is named by the part that is at fault."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models import make_model
from rl.batch import collate, trajectory
from rl.parity.guesses.told import told
from rl.types import Batch, Completion, Prompt
from trainer.learner.edits import edited
from trainer.learner.suspects import trainer_fault
from trainer.model.policy import Policy, load
from trainer.model.witness import Witness, in_fp32, make_witness

LIMIT = 3e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for group, length in enumerate((5, 9)):
        prompt = Prompt(
            ordinal=group, token_ids=torch.randint(3, 100, (length,), generator=generator).tolist(), task={}
        )
        for n in (4, 7):
            ids = torch.randint(3, 100, (n,), generator=generator).tolist()
            reply = Completion(token_ids=ids, logprobs=[0.0] * n, versions=[0] * n, finish_reason="length")
            rows.append(trajectory(prompt, reply, 0.0, {}))
    return collate(rows)


def policy_of(model: Path) -> Policy:
    return load(str(model), dtype="float32", fp32_head=True, share_prompts=True)


def witness_of(policy: Policy, model: Path) -> Witness:
    return make_witness(policy.hf, str(model), device=torch.device("cpu"), sharded=False, remote=False)


def fault(policy: Policy, model: Path, batch: Batch, trainer: Policy | None = None) -> tuple[str, str]:
    """What the trainer's numbers are blamed on."""
    witness = witness_of(policy, model)
    logits, hidden = witness.rows(batch)
    config = SimpleNamespace(temperature=0.8, rollout=SimpleNamespace(truncation=None))
    rank: Any = SimpleNamespace(
        policy=policy, engine=policy, head=policy.hf.get_output_embeddings(), config=config, device="cpu"
    )
    numbers = policy(batch.input_ids, batch.mask, 0.8).logprobs
    seen = told(batch, logits, numbers, temperature=0.8, truncation=None, forbidden=None)
    assert seen.remains(seen.expected) > LIMIT, "the fault changes nothing"
    return trainer_fault(rank, batch, witness, seen, hidden, LIMIT)


@torch.no_grad()
def test_the_witness_has_the_policys_weights_and_gives_its_numbers(model: Path, batch: Batch) -> None:
    policy = policy_of(model)
    for parameter in policy.parameters():
        parameter.mul_(1.01)  # weights that are in no file
    logits, _ = witness_of(policy, model).rows(batch)
    own = policy(batch.input_ids, batch.mask, 0.8).logprobs
    seen = told(batch, logits, own, temperature=0.8, truncation=None, forbidden=None)
    assert seen.remains(seen.expected) < 1e-5


@torch.no_grad()
def test_dropout_a_scale_and_a_head_in_bf16_are_told_apart(model: Path, batch: Batch) -> None:
    policy = policy_of(model)
    hook = (
        policy.hf.get_decoder()
        .layers[0]
        .mlp.register_forward_hook(lambda module, args, out: torch.nn.functional.dropout(out, 0.3))
    )
    assert fault(policy, model, batch)[0] == "mode"
    hook.remove()
    hidden = policy._hidden
    policy._hidden = lambda *args: (1.1 * hidden(*args)[0], None)  # type: ignore[method-assign]
    assert fault(policy, model, batch) == ("scale", "its last hidden states are the model's own times 1.1")
    policy._hidden = hidden  # type: ignore[method-assign]
    policy.hf.get_output_embeddings().fp32 = False
    policy.hf.get_output_embeddings().weight.data = policy.hf.get_output_embeddings().weight.data.bfloat16().float()
    forward = policy.hf.get_output_embeddings().forward
    policy.hf.get_output_embeddings().forward = lambda h, *args: forward(h.bfloat16().float(), *args)
    assert fault(policy, model, batch)[0] in ("head_dtype", "rounded", "trainer_body")


@pytest.mark.slow
@torch.no_grad()
def test_an_engine_that_had_another_prompt_or_other_positions_is_recognised(model: Path, batch: Batch) -> None:
    policy = policy_of(model)
    witness = witness_of(policy, model)
    logits, _ = witness.rows(batch)
    right = told(batch, logits, torch.zeros(batch.mask.shape), temperature=0.8, truncation=None, forbidden=None)

    def numbers(prompt: Any, positions: Any = None) -> torch.Tensor:
        out = torch.zeros(batch.mask.shape)
        for row, mask in enumerate(batch.mask):
            columns = mask.nonzero()[:, 0]
            start = int(columns[0]) + 1
            sent = prompt(batch.input_ids[row, :start])
            reply = batch.input_ids[row, columns + 1]
            ids = torch.cat([sent, reply])[:-1]
            at = None if positions is None else positions(len(ids), len(sent))
            log_p = (witness.row(ids, at)[0][len(sent) - 1 :] / 0.8).log_softmax(-1)
            out[row, columns] = log_p.gather(1, reply[:, None])[:, 0]
        return out

    def best(reported: torch.Tensor) -> tuple[str, str]:
        seen = told(batch, right.logits, reported, temperature=0.8, truncation=None, forbidden=None)
        first = min(edited(witness, seen, batch), key=lambda g: g.residual)
        assert first.residual < 1e-5
        return first.cause, first.text

    assert best(numbers(lambda p: torch.cat([p[:1], p]))) == (
        "prompt_tokens",
        "the engine had each prompt its first token doubled",
    )
    assert best(numbers(lambda p: p[2:]))[0] == "prompt_tokens"
    assert (
        best(
            numbers(lambda p: p, lambda n, p: torch.where(torch.arange(n) >= p, torch.arange(n) + 1, torch.arange(n)))
        )[0]
        == "positions"
    )


def test_in_fp32_gives_the_weights_back_bit_for_bit() -> None:
    layer = torch.nn.Linear(3, 3).bfloat16()
    before = layer.weight.data_ptr()
    with in_fp32(layer):
        assert layer.weight.dtype == torch.float32
    assert (layer.weight.dtype, layer.weight.data_ptr()) == (torch.bfloat16, before)
