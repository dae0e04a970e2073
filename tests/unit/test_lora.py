"""Adapters: what engines get is PEFT's own merged model, and without adapters the policy is the one it began as."""

import copy
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from models import make_model
from rl.config import Lora
from trainer.learner.weights import LearnerWeights
from trainer.model.lora import adapted, adapter_parameters, as_engines_have_it, inject, save_adapter, switched_off


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("lora"), tied=True))


def with_adapters(model, *, dtype=torch.float32, trained=True):
    """A model with adapters, random where `trained`, else as they begin."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    torch.manual_seed(0)
    inject(hf, Lora(rank=4, alpha=8.0))
    for name, p in hf.named_parameters():
        if trained and ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.1)
    return hf


IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@torch.no_grad()
def logits(hf):
    return hf(input_ids=IDS, use_cache=False).logits


def test_every_linear_layer_but_the_head_has_an_adapter_and_nothing_else_is_trained(model):
    hf = with_adapters(model)
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    layers = [f"model.layers.{i}.{part}" for i in (0, 1) for part in parts]
    assert sorted(adapted(hf)) == sorted(f"{layer}.weight" for layer in layers)
    trained = {name for name, p in hf.named_parameters() if p.requires_grad}
    assert trained == {f"{layer}.lora_{x}.default.weight" for layer in layers for x in "AB"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_that_are_new_leave_every_bit_of_the_model_that_engines_get(model, dtype):
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[0, 0] = -0.0
    hf = with_adapters(model, dtype=dtype, trained=False)
    hf.model.layers[0].mlp.up_proj.base_layer.weight.data[0, 0] = -0.0
    sent, started = LearnerWeights(hf, sharded=False), LearnerWeights(base, sharded=False)
    assert sent.metadata() == started.metadata()
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    for (name, tensor), (_, expected) in zip(sent, started, strict=True):
        assert torch.equal(tensor.view(integer), expected.view(integer)), name


def test_merged_weights_are_those_of_peft(model):
    hf = with_adapters(model)
    sent = dict(LearnerWeights(hf, sharded=False))
    theirs = copy.deepcopy(hf)
    for layer in adapted(theirs).values():
        layer.merge()
    for name, layer in adapted(theirs).items():
        torch.testing.assert_close(sent[name], layer.base_layer.weight, rtol=0, atol=1e-6)
        assert not torch.equal(sent[name], adapted(hf)[name].base_layer.weight)
    # A model with them says what the one with adapters says.
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain.load_state_dict(sent, strict=False)
    torch.testing.assert_close(logits(plain), logits(hf), rtol=0, atol=1e-4)


def test_a_merged_weight_in_bf16_is_added_in_fp32_and_rounded_once(model):
    hf = with_adapters(model, dtype=torch.bfloat16)
    for name, tensor in LearnerWeights(hf, sharded=False):
        if name in adapted(hf):
            layer = adapted(hf)[name]
            a, b = (getattr(layer, f"lora_{x}")["default"].weight.double() for x in "AB")
            exact = layer.base_layer.weight.double() + 2.0 * b @ a
            assert ((tensor.double() - exact).abs() <= exact.abs() / 256 + 1e-9).all(), name


def test_switched_off_the_policy_is_the_reference_and_its_adapters_still_learn_afterwards(model):
    hf, base = with_adapters(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    said = logits(hf)
    with switched_off(hf):
        assert torch.equal(logits(hf), logits(base))
    assert torch.equal(logits(hf), said)
    assert not torch.allclose(said, logits(base), atol=0.1)
    hf(input_ids=IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
    assert all(p.grad.any() for layer in adapted(hf).values() for p in adapter_parameters(layer))


def test_the_doctor_compares_an_engines_layer_with_the_merged_one(model):
    hf = with_adapters(model)
    layer = hf.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 128)
    torch.testing.assert_close(as_engines_have_it(layer)(x), layer(x), rtol=0, atol=1e-5)
    assert as_engines_have_it(hf.model.norm) is hf.model.norm


def test_peft_loads_the_adapters_that_an_export_leaves(model, tmp_path):
    hf = with_adapters(model)
    save_adapter(hf, model, tmp_path)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tmp_path)
    assert torch.equal(logits(theirs), logits(hf))


def test_without_peft_the_remedy_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"trainer\.lora needs PEFT: python -m pip install 'peft"):
        inject(AutoModelForCausalLM.from_pretrained(model), Lora(rank=4))
