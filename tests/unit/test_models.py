"""Models of other families: their logits, their stop ids, their files, and what the trainer refuses."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from models import FAMILIES, SIZES, make_model
from rl.tokens import stop_ids
from trainer.learner.export import exported
from trainer.learner.weights import LearnerWeights
from trainer.model.attention import packs
from trainer.model.files import copy_companions, listed_stop_ids, model_config, without_weights
from trainer.model.head import LogprobHead
from trainer.model.logits import LogitsMap
from trainer.model.measure import measure
from trainer.model.own_forward import check_own_forward
from trainer.model.policy import load

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("family"), **FAMILIES[request.param])


def policy_of(model: Path):
    return load(str(model), dtype="float32", fp32_head=True, share_prompts=True).eval()


@pytest.mark.slow
def test_each_family_has_the_log_probabilities_and_gradients_of_its_own_forward_pass(family: Path) -> None:
    policy = policy_of(family)
    gap = check_own_forward(policy, policy, name="tiny", dtype="float32", device=CPU)
    assert gap <= 1e-5
    # The same after a backward pass: every weight has the gradient that transformers' own graph gives.
    ids = torch.randint(5, 100, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 19, dtype=torch.bool)
    gradients = []
    for plain in (False, True):
        policy.zero_grad()
        policy(ids, mask, 0.7, plain=plain).logprobs.mean().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, ours in gradients[0].items():
        torch.testing.assert_close(ours, gradients[1][name], atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_what_is_sent_has_the_names_and_values_of_the_familys_checkpoint(family: Path) -> None:
    hf = AutoModelForCausalLM.from_pretrained(family)
    weights = LearnerWeights(hf, sharded=False)
    sent, files = dict(weights), load_file(family / "model.safetensors")
    files.pop("lm_head.weight" if hf.config.tie_word_embeddings else "", None)
    assert sent.keys() == files.keys()
    assert all(torch.equal(sent[name], tensor) for name, tensor in files.items())
    assert [(m.name, m.shape) for m in weights.metadata()] == [(n, tuple(t.shape)) for n, t in sent.items()]


def logits_of(map_: LogitsMap, x: torch.Tensor) -> torch.Tensor:
    return map_.apply_(x.clone())


@pytest.mark.parametrize(
    ("family", "sizes", "expected"),
    [
        ("llama", {}, LogitsMap()),
        ("gemma2", {"final_logit_softcapping": 30.0}, LogitsMap(cap=30.0)),
        ("gemma3_text", {"final_logit_softcapping": 7.5}, LogitsMap(cap=7.5)),
        ("gemma2", {"final_logit_softcapping": None}, LogitsMap()),
        ("granite", {"logits_scaling": 8.0}, LogitsMap(scale=0.125)),
        ("granitemoe", {"logits_scaling": 3.0}, LogitsMap(scale=1 / 3)),
        ("cohere", {"logit_scale": 0.0625}, LogitsMap(scale=0.0625)),
        ("cohere2", {"logit_scale": 2.0}, LogitsMap(scale=2.0)),
        ("falcon_h1", {"lm_head_multiplier": 0.5}, LogitsMap(scale=0.5)),
        ("gpt2", {}, LogitsMap()),
        ("opt", {}, LogitsMap()),
    ],
)
def test_what_a_model_does_to_its_logits_is_measured_without_its_weights(family, sizes, expected) -> None:
    config = AutoConfig.for_model(family, **SIZES | {"vocab_size": 100, "pad_token_id": 0} | sizes)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config)
    found = measure(hf)
    assert found.scale == pytest.approx(expected.scale, rel=1e-6)
    assert found.cap == (expected.cap and pytest.approx(expected.cap, rel=1e-6))
    # The model has its own body and head again.
    assert hf.get_output_embeddings().weight.is_meta
    assert not any(type(module).__name__ == "_StandIn" for module in hf.modules())


class Odd(nn.Module):
    """A model whose logits are `change` of its lm_head's product."""

    def __new__(cls, change, before=lambda h: h):
        config = AutoConfig.for_model("llama", **SIZES | {"vocab_size": 100})
        hf = AutoModelForCausalLM.from_config(config)

        def forward(input_ids, **_):
            hidden = before(hf.model(input_ids=input_ids, use_cache=False).last_hidden_state)
            return SimpleNamespace(logits=change(hf.lm_head(hidden)))

        hf.forward = forward
        return hf


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ((lambda x: x + 0.3,), "more than a scale and a soft cap"),
        ((lambda x: x.clamp(-20, 20),), "more than a scale and a soft cap"),
        ((lambda x: x.masked_fill(torch.arange(100) == 7, -1e9),), "more than a scale and a soft cap"),
        ((lambda x: x * x.abs(),), "more than a scale and a soft cap"),
        ((lambda x: x, lambda h: h / 3), "hidden states between its body and its lm_head"),
    ],
)
def test_a_model_that_changes_its_logits_in_another_way_is_refused_by_name(odd, message) -> None:
    with pytest.raises(ValueError, match=f"llama .*{message}"):
        measure(Odd(*odd))


def test_a_policy_that_leaves_out_a_soft_cap_is_refused_with_family_and_size(tmp_path: Path) -> None:
    policy = policy_of(make_model(tmp_path, **FAMILIES["Gemma-2"] | {"peak": 40.0}))
    policy.hf.get_output_embeddings().mapped = LogitsMap()
    with pytest.raises(ValueError, match=r"of tiny \(gemma2\) are not the model's own.* differ by [\d.]+e[+-]\d+ nats"):
        check_own_forward(policy, policy, name="tiny", dtype="float32", device=CPU)


def test_packed_rows_of_a_family_that_they_do_not_fit_are_named_as_the_cause(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("trainer.model.attention.PLAIN", frozenset({"mistral"}))
    monkeypatch.setattr("trainer.model.policy.packs", lambda config: True)
    policy = policy_of(make_model(tmp_path, **FAMILIES["Qwen2"]))

    def no_positions(module, args, kwargs):
        if kwargs.get("segments"):
            kwargs["position_ids"] = kwargs["position_ids"] * 0
        return args, kwargs

    policy.hf.get_decoder().register_forward_pre_hook(no_positions, with_kwargs=True)
    with pytest.raises(ValueError, match=r"Likely cause: packed rows"):
        check_own_forward(policy, policy, name="tiny", dtype="float32", device=CPU)


@pytest.mark.parametrize("map_", [LogitsMap(), LogitsMap(scale=0.3), LogitsMap(cap=2.0), LogitsMap(scale=3.0, cap=1.5)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_head_has_the_gradients_of_autograd_with_a_bias_a_scale_and_a_cap(map_: LogitsMap, bias: bool) -> None:
    torch.manual_seed(0)
    lm_head, hidden = nn.Linear(16, 40, bias=bias), torch.randn(9, 16, requires_grad=True)
    targets, up = torch.randint(0, 40, (9,)), torch.randn(2, 9)
    gradients = []
    for ours in (True, False):
        for x in (hidden, *lm_head.parameters()):
            x.grad = None
        if ours:
            answers = LogprobHead(lm_head, fp32=True, mapped=map_)(hidden, targets, 0.7)
        else:
            z = lm_head(hidden) * map_.scale
            z = (map_.cap * torch.tanh(z / map_.cap) if map_.cap else z) / 0.7
            log_p = z.log_softmax(-1)
            answers = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        (torch.stack(list(answers)) * up).sum().backward()
        gradients.append([x.grad.clone() for x in (hidden, *lm_head.parameters())])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("eos", "generation", "config", "expected"),
    [
        (1, {}, {}, [1]),
        (1, {"eos_token_id": [1, 3]}, {"eos_token_id": 1}, [1, 3]),
        (1, {"eos_token_id": 3}, {"eos_token_id": [5]}, [1, 3, 5]),
        (1, {}, {"text_config": {"eos_token_id": 106}}, [1, 106]),
        (None, {"eos_token_id": [7]}, {}, [7]),
        (0, {}, {"eos_token_id": None}, [0]),
        (None, {}, {}, []),
        (103, {}, {"vocab_size": 103, "eos_token_id": 7}, [7]),
        (103, {}, {"text_config": {"vocab_size": 103}}, []),
    ],
)
def test_stop_ids_are_the_set_of_what_tokenizer_and_files_name(eos, generation, config, expected) -> None:
    assert stop_ids(SimpleNamespace(eos_token_id=eos), generation, config) == expected


def test_stop_ids_come_from_all_files_of_a_model(tmp_path: Path) -> None:
    model = make_model(tmp_path, stops=[1, 3])
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert listed_stop_ids(str(model), tokenizer) == [1, 3]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 9}))
    assert listed_stop_ids(str(model), tokenizer) == [1, 3, 9]
    (model / "generation_config.json").unlink()
    assert listed_stop_ids(str(model), tokenizer) == [1, 9]


def test_an_export_has_every_file_of_the_base_but_config_and_weights_bit_for_bit(tmp_path: Path) -> None:
    base, out = make_model(tmp_path / "base", stops=[1, 3], chat_template="{{ messages }}"), tmp_path / "out"
    out.mkdir()
    # transformers would refuse to save this file again: a temperature without sampling.
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 3], "temperature": 0.6, "do_sample": false}')
    (base / "preprocessor_config.json").write_text("{}")
    (base / "model.safetensors.index.json").write_text("{}")
    (base / "README.md").write_text("the base's card")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("t")
    names = copy_companions(str(base), AutoTokenizer.from_pretrained(base), out)
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} <= set(
        names
    )
    assert {"chat_template.jinja"} <= set(names)
    for name in [*names, "additional_chat_templates/tools.jinja"]:
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not {"model.safetensors", "model.safetensors.index.json", "README.md", "config.json"} & {
        p.name for p in out.iterdir()
    }


def test_a_weight_is_exported_apart_from_its_stack_and_in_the_dtype_that_was_asked_for() -> None:
    stack = torch.randn(3, 4, 5)
    one = exported(stack[1], torch.float32)
    assert torch.equal(one, stack[1])
    assert one.untyped_storage().nbytes() == one.nbytes
    assert exported(stack, torch.bfloat16).dtype == torch.bfloat16
    assert exported(torch.arange(3), torch.bfloat16).dtype == torch.int64
    assert exported(stack.transpose(1, 2), torch.float32).is_contiguous()


def test_which_families_pack_their_rows() -> None:
    packed = {
        name for name, how in FAMILIES.items() if packs(AutoConfig.for_model(how["family"], **SIZES | _config(how)))
    }
    assert packed == {
        "Llama",
        "Llama, tied",
        "Qwen2",
        "Qwen2.5, tied, padded vocabulary",
        "Qwen3",
        "OLMo-2",
        "SmolLM3",
        "Qwen3-MoE",
        "OLMoE",
    }


def _config(how: dict) -> dict:
    return {k: v for k, v in how.items() if k not in ("family", "tied", "stops", "padding")}


def test_a_model_of_another_kind_is_refused_before_anything_starts(tmp_path: Path) -> None:
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="family t5, which transformers does not know as a causal language model"):
        without_weights(model_config(str(tmp_path)))
