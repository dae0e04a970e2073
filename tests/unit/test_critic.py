"""The critic: a learning rate of its own, and a warm-up in which it alone learns."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rl.loss import critic_alone, full_loss, prepare
from rl.objectives import PPO
from rl.objectives.corrections import Uncorrected
from rl.types import Step
from trainer.learner.deepspeed_engine import parameter_groups
from trainer.model.policy import Policy


def policy(with_values=True):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    hf = Qwen2ForCausalLM(Qwen2Config(vocab_size=20, num_key_value_heads=1, tie_word_embeddings=True, **sizes))
    return Policy(hf, fp32_head=True, with_values=with_values, share_prompts=False)


def batch():
    mask = torch.tensor([[False, True, True, True], [False, True, True, False]])
    nothing = torch.zeros(2, 4)
    return Step(
        input_ids=torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(1)),
        mask=mask,
        rollout_logprobs=nothing,
        versions=torch.zeros(2, 4, dtype=torch.long),
        rewards=torch.tensor([1.0, 0.0]),
        group_ids=torch.tensor([0, 0]),
        old_logprobs=nothing,
        values=nothing,
    )


def gradients(model, *, warming_up):
    """The largest gradient of the body, and of the value head, after one PPO loss with an entropy bonus."""
    objective = PPO(entropy_coef=0.1)
    step, advantages = prepare(objective, batch())
    said = model(step.input_ids, step.mask, 1.0, head_alone=warming_up).output()
    said = critic_alone(said) if warming_up else said
    loss, _ = full_loss(objective, Uncorrected(), said, step, advantages)
    torch.where(step.mask, loss, 0.0).sum().backward()
    body = [p.grad for p in model.hf.parameters()]
    assert all(g is not None for g in body), "DeepSpeed waits for a gradient of every weight"
    return max(float(g.abs().max()) for g in body), float(model.value_head.weight.grad.abs().max())


def test_while_the_critic_warms_up_only_the_value_head_has_a_gradient():
    model = policy()
    torch.nn.init.ones_(model.value_head.weight)  # at 0 the values have no gradient to pass on
    body, head = gradients(model, warming_up=True)
    assert body == 0
    assert head > 0
    model.zero_grad()
    body, _ = gradients(model, warming_up=False)
    assert body > 0


def test_the_value_head_has_the_learning_rate_it_is_given():
    model = policy()
    body, head = parameter_groups(model, 1e-2)
    optimizer = torch.optim.SGD([body, head], lr=1e-5)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-5, 1e-2]
    assert [id(p) for p in head["params"]] == [id(p) for p in model.value_head.parameters()]
    assert len(body["params"]) + len(head["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(("with_values", "value_lr"), [(True, None), (False, None)])
def test_without_one_all_weights_are_one_group(with_values, value_lr):
    model = policy(with_values)
    (group,) = parameter_groups(model, value_lr)
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
