"""Tokens go to the experts that an engine reports: in every layout of rows, with the gradients of a router that chose
them itself, and each token to its own."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from rl.batch import collate, take, trajectory
from rl.config import Config, RolloutConfig
from rl.environments.tree import Tree
from rl.episodes.joined import joined
from rl.types import Completion, Data, PolicyOutput, Prompt, Trajectory
from rl.validate import check
from rollout.settings import engine_args
from trainer.model.attention import NAME, packs
from trainer.model.experts.replay import FAMILIES
from trainer.model.packing import pack
from trainer.model.policy import Policy, _checkpoint
from trainer.model.ulysses import Ulysses
from trainer.plan.rules import check_experts_reported, check_router

VOCABULARY, EXPERTS, CHOSEN, LAYERS = 40, 5, 2, 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYOUTS = ("padded", "packed", "shared")


def model_of(family, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | more)).eval()


def policy_of(family, layout="padded", *, checkpointing=False, **more):
    hf = model_of(family, **more)
    if checkpointing:
        _checkpoint(hf)
    policy = Policy(hf, fp32_head=True, with_values=False, share_prompts=layout == "shared")
    assert policy.packs or family == "qwen2_moe"
    if layout == "padded":
        policy.packs = policy.share_prompts = False
        hf.set_attn_implementation("sdpa")
    return policy


def rows():
    """Four rows of two prompts, right-padded; their replies have 6, 2, 4 and 1 tokens."""
    g = torch.Generator().manual_seed(1)
    ids, mask = torch.zeros(4, 11, dtype=torch.long), torch.zeros(4, 10, dtype=torch.bool)
    for row, (prompt, reply) in enumerate([([5, 6, 7, 8, 9], 6), ([5, 6, 7, 8, 9], 2), ([3, 4], 4), ([3, 4], 1)]):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        ids[row, len(prompt) : len(prompt) + reply] = torch.randint(3, VOCABULARY, (reply,), generator=g)
        mask[row, len(prompt) - 1 : len(prompt) + reply - 1] = True
    return ids, mask


IDS, MASK = rows()
ENDS = [10, 6, 5, 2]
"""Columns of each row."""


def some_experts():
    """Two different experts for each token and layer; rows of one prompt have the same for its tokens, as in an engine;
    -1 behind a row."""
    g = torch.Generator().manual_seed(7)
    draws = torch.rand(4, 10, LAYERS, EXPERTS, generator=g)
    draws[1, :5], draws[3, :2] = draws[0, :5], draws[2, :2]
    experts = draws.argsort(-1)[..., :CHOSEN].to(torch.int16)
    for row, end in enumerate(ENDS):
        experts[row, end:] = -1
    return experts


def by_hand(hf, ids, experts):
    """Log-probabilities [S - 1] of a row whose routers choose these experts [S - 1, layers, k]; written without hooks.

    A router's weights are its softmax over all experts, at the chosen ones, divided by their sum if the family does.
    """
    layer = iter(range(LAYERS))
    kept = {}
    normed = hf.config.model_type == "mixtral" or hf.config.norm_topk_prob

    def router(module):
        at = next(layer)

        def forward(hidden):
            logits = F.linear(hidden, module.weight)
            weights = torch.stack([logits.softmax(-1)[t, experts[t, at].long()] for t in range(len(hidden))])
            return logits, weights / weights.sum(-1, keepdim=True) if normed else weights, experts[:, at].long()

        return forward

    for name, module in hf.named_modules():
        if name.endswith(".gate"):
            kept[name] = module
            module.forward = router(module)
    logits = hf(ids[None, :-1], use_cache=False).logits[0]
    for module in kept.values():
        del module.forward
    assert len(kept) == LAYERS
    return logits.float().log_softmax(-1).gather(-1, ids[1:, None])[:, 0]


def loss_of(logprobs):
    return (torch.linspace(-1.0, 1.0, logprobs.numel()).reshape(logprobs.shape) * logprobs).sum()


def gradients(module):
    return {n.removeprefix("hf."): p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def relative(one, other):
    assert one.keys() == other.keys()
    pairs = [(one[n].double().flatten(), other[n].double().flatten()) for n in other]
    mine, want = (torch.cat(x) for x in zip(*pairs, strict=True))
    return float((mine - want).norm() / want.norm())


@pytest.mark.slow
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_replayed_experts_give_the_numbers_and_gradients_of_routers_that_chose_them(family, layout, norm):
    if family == "qwen2_moe" and layout != "padded":
        pytest.skip("its rows stay padded")
    experts = some_experts()
    policy = policy_of(family, layout, norm_topk_prob=norm)
    said = policy(IDS, MASK, 1.0, experts=experts).logprobs
    loss_of(said).backward()
    hf = model_of(family, norm_topk_prob=norm)
    want = torch.zeros(MASK.shape)
    for row, end in enumerate(ENDS):
        want[row, :end] = by_hand(hf, IDS[row, : end + 1], experts[row, :end])
    want = torch.where(MASK, want, 0.0)
    loss_of(want).backward()
    assert (said - want).abs().max() < 1e-5
    own = policy(IDS, MASK, 1.0).logprobs
    assert (own - want).abs().max() > 0.1, "these are not the experts that the routers choose"
    mine, theirs = gradients(policy), gradients(hf)
    assert relative(mine, theirs) < 1e-5
    routers = {n: g for n, g in theirs.items() if ".gate." in n}
    assert len(routers) == LAYERS
    assert all(g.abs().max() > 1e-4 for g in routers.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_router_s_own_choice_replayed_changes_no_bit_and_counts_nothing(layout):
    policy = policy_of("qwen3_moe", layout)
    chosen = []
    for name, module in policy.hf.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(lambda _, args, out: chosen.append(out[2]))
    policy.packs, policy.share_prompts = False, False
    policy.hf.set_attn_implementation("sdpa")
    with torch.no_grad():
        policy(IDS, MASK, 1.0)
        experts = torch.stack(chosen, 1).reshape(*MASK.shape, LAYERS, CHOSEN)
        if layout != "padded":
            policy.packs, policy.share_prompts = True, layout == "shared"
            policy.hf.set_attn_implementation(NAME)
        own = policy(IDS, MASK, 1.0).logprobs
        policy.replay.counts.zero_()
        said = policy(IDS, MASK, 1.0, experts=experts).logprobs
    assert torch.equal(said, own)
    moved, tokens, moved_pairs, pairs = policy.replay.counts.tolist()
    assert (moved, moved_pairs) == (0, 0)
    assert tokens == {"padded": 40, "packed": 23, "shared": 16}[layout]
    assert pairs == LAYERS * tokens


def test_tokens_with_other_experts_are_counted_with_and_without_replay():
    policy = policy_of("qwen3_moe")
    chosen = []
    for name, module in policy.hf.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(lambda _, args, out: chosen.append(out[2]))
    with torch.no_grad():
        own = policy(IDS, MASK, 1.0).logprobs
        experts = torch.stack(chosen, 1).reshape(*MASK.shape, LAYERS, CHOSEN).clone()
        # Another expert in the last layer of three tokens, and the same two in another order in one.
        for row, t in ((0, 3), (0, 4), (2, 1)):
            experts[row, t, 1, 0] = next(e for e in range(EXPERTS) if e not in experts[row, t, 1])
        experts[1, 0, 0] = experts[1, 0, 0].flip(-1)
        experts[3, 5:] = -1
        for counting_only in (False, True):
            policy.replay.counts.zero_()
            policy.replay.counting_only = counting_only
            said = policy(IDS, MASK, 1.0, experts=experts).logprobs
            assert policy.replay.counts.tolist() == [3, 35, 3, 70]
            assert torch.equal(said, own) == counting_only


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_a_layer_that_runs_again_in_the_backward_pass_replays_the_same_experts(layout):
    experts, found = some_experts(), []
    for checkpointing in (False, True):
        policy = policy_of("olmoe", layout, checkpointing=checkpointing)
        said = policy(IDS, MASK, 1.0, experts=experts).logprobs
        loss_of(said).backward()
        found.append((said.detach(), gradients(policy), policy.replay.counts))
    (said, want, counts), (again, mine, counted) = found
    assert (again - said).abs().max() < 1e-6
    assert relative(mine, want) < 1e-6
    assert counts.tolist() == counted.tolist()


def test_without_gradients_no_experts_stay_behind():
    policy = policy_of("qwen3_moe")
    with torch.no_grad():
        own = policy(IDS, MASK, 1.0).logprobs
        policy(IDS, MASK, 1.0, experts=some_experts())
        assert policy.replay.experts is None
        assert torch.equal(policy(IDS, MASK, 1.0).logprobs, own)


def test_reported_experts_that_no_router_can_take_are_an_error():
    policy = Policy(model_of("qwen2"), fp32_head=True, with_values=False, share_prompts=False)
    assert policy.replay is None
    with pytest.raises(AssertionError, match="the trainer knows no router"):
        policy(IDS, MASK, 1.0, experts=some_experts())


@pytest.mark.parametrize("share_prompts", [False, True])
def test_ranks_that_share_a_row_take_the_experts_of_their_own_tokens(share_prompts):
    row = pack(IDS, MASK, share_prompts=share_prompts)
    flat = IDS[:, :-1].flatten()
    assert torch.equal(flat[row.origin], row.input_ids[0])
    found = []
    for place in range(3):
        ulysses = object.__new__(Ulysses)
        ulysses.size, ulysses.place = 3, place
        own, _ = ulysses.part(row)
        assert len(own.origin) == own.input_ids.shape[1]
        found.append(own)
    ids, origin = (torch.cat(x) for x in ([o.input_ids[0] for o in found], [o.origin for o in found]))
    tokens = row.input_ids.shape[1]
    assert torch.equal(flat[origin[:tokens]], ids[:tokens])


# -- how they travel ---------------------------------------------------------------------------------------------------


def numbered(first, tokens):
    """Experts that tell the token: [tokens, layers, k], whose first entry counts from `first`."""
    at = torch.arange(first, first + tokens, dtype=torch.uint8)
    return torch.stack([torch.stack([at, at + 100], -1), torch.stack([at + 50, at + 150], -1)], 1)


def completion(*token_ids, experts=None):
    n = len(token_ids)
    return Completion(
        token_ids=list(token_ids), logprobs=[-1.0] * n, versions=[3] * n, finish_reason="stop", experts=experts
    )


def test_column_t_of_a_batch_has_the_experts_of_the_token_that_is_read_there():
    long = trajectory(
        Prompt(ordinal=0, token_ids=[7, 8], task={}), completion(9, 10, 11, experts=numbered(0, 4)), 1.0, {}
    )
    short = trajectory(Prompt(ordinal=1, token_ids=[7], task={}), completion(12, experts=numbered(9, 1)), 1.0, {})
    batch = collate([short, long])
    assert batch.experts.shape == (2, 4, 2, 2)
    assert batch.experts[:, :, 0, 0].tolist() == [[9, -1, -1, -1], [0, 1, 2, 3]]
    assert batch.experts[1, 2].tolist() == [[2, 102], [52, 152]]
    assert take(batch, torch.tensor([0])).experts[:, :, 0, 0].tolist() == [[9]]
    assert batch.to_device(torch.device("meta")).experts.device.type == "meta"
    assert collate([replace(long, experts=None)]).experts is None
    with pytest.raises(AssertionError, match="and some do not"):
        collate([long, replace(short, experts=None)])
    with pytest.raises(AssertionError, match="experts of 3 of 5 tokens"):
        collate([replace(long, experts=numbered(0, 3))])


@pytest.mark.slow
def test_what_vllm_reports_for_prompt_and_reply_arrives_with_the_completion():
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, WeightVersionSpan

    from rollout.completion import completion as read

    def said(experts):
        return CompletionOutput(
            index=0,
            text="",
            token_ids=[7, 9],
            cumulative_logprob=None,
            logprobs=[{7: Logprob(-0.5)}, {9: Logprob(-0.1)}],
            finish_reason="stop",
            weight_versions=[WeightVersionSpan(start=0, end=2, version="3")],
            routed_experts=experts,
        )

    reported = numbered(0, 4)
    assert torch.equal(read(said(reported.numpy()), 3, 0).experts, reported)
    assert read(said(None), 3, 0).experts is None
    with pytest.raises(AssertionError, match="the experts of 4 tokens, not of 5"):
        read(said(reported.numpy()), 4, 0)


def test_more_than_127_experts_keep_their_numbers():
    many = torch.tensor([[[300, 511]], [[128, 255]]], dtype=torch.uint16)
    t = trajectory(Prompt(ordinal=0, token_ids=[7, 8], task={}), completion(9, experts=many), 1.0, {})
    assert collate([t]).experts.tolist() == [[[[300, 511]], [[128, 255]]]]


def test_a_row_of_several_turns_has_the_experts_with_which_each_token_was_first_read():
    tree = Tree()
    tree.add([1, 2], completion(10, 11, experts=numbered(0, 3)), 0)
    # The second request reads [1, 2, 10, 11, 3] again, and samples 12.
    tree.add([1, 2, 10, 11, 3], completion(12, experts=numbered(20, 5)), 1)
    [row] = tree.rows(group=0, episode=0, reward=1.0)
    assert [*row.token_ids] == [1, 2, 10, 11, 3, 12]
    # 11 was sampled last in the first turn, and first read in the second.
    assert row.experts[:, 0, 0].tolist() == [0, 1, 2, 23, 24]
    assert collate([row]).experts.shape == (1, 5, 2, 2)
    bare = Tree()
    bare.add([1, 2], completion(10), 0)
    assert bare.rows(group=0, episode=0, reward=1.0)[0].experts is None


def test_an_objective_sees_no_experts_where_rows_are_joined():
    two = [
        Trajectory(
            group=0,
            row=row,
            token_ids=[1, 2, 3],
            mask=[False, False, True],
            logprobs=[0.0, 0.0, -1.0],
            versions=[-1, -1, 0],
            reward=1.0,
            turns=[-1, -1, row],
            experts=numbered(0, 2),
        )
        for row in range(2)
    ]
    batch = collate(two)
    policy = PolicyOutput(logprobs=torch.zeros(2, 2), entropy=torch.zeros(2, 2))
    one, _, _ = joined(batch, policy, torch.zeros(2, 2))
    assert one.mask.shape == (1, 2)
    assert one.experts is None
    assert batch.experts is not None


# -- where it is refused -----------------------------------------------------------------------------------------------


def config_of(**more):
    return Config(name="x", model="m", data=lambda: Data(train=[]), reward=lambda reply: 0.0, **more)


def test_engines_are_asked_for_experts_only_with_router_replay():
    for on in (False, True):
        config = config_of(rollout=RolloutConfig(router_replay=on))
        assert engine_args(config, device="cuda", backend="nccl", model="m")["enable_return_routed_experts"] is on


def test_router_replay_is_refused_where_engines_report_no_experts(monkeypatch):
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    config = config_of(rollout=RolloutConfig(router_replay=True))
    check_experts_reported(config, "cuda")
    check_experts_reported(config_of(), "cpu")
    with pytest.raises(
        ValueError, match=r"router_replay=True on cpu: .*does not report the experts of a token; set it"
    ):
        check_experts_reported(config, "cpu")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    check_experts_reported(config, "cpu")
    with pytest.raises(ValueError, match=r"needs rollout\.prefix_cache=True"):
        check(config_of(rollout=RolloutConfig(router_replay=True, prefix_cache=False)))


def test_router_replay_is_refused_for_a_model_without_experts(monkeypatch):
    def family(name):
        text = SimpleNamespace(get_text_config=lambda: SimpleNamespace(model_type=name))
        monkeypatch.setattr("trainer.plan.rules.model_config", lambda *_, **__: text)

    config = config_of(rollout=RolloutConfig(router_replay=True))
    family("qwen3")
    with pytest.raises(ValueError, match="and this model is qwen3: set it to False"):
        check_router(config)
    check_router(config_of())
    family("qwen3_moe")
    check_router(config)


def test_the_families_of_the_recipes_are_packed():
    assert {f for f in FAMILIES if packs(AutoConfig.for_model(f, **SIZES))} == FAMILIES - {"qwen2_moe"}
