"""Stop tokens, stop texts, min_tokens and bad words: a real engine obeys them, and the trainer has its distribution."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from faults import in_sampling
from live import Live, engine_config
from pair import Pair, examiner, make_learner
from rl.batch import collate, trajectory
from rl.config import RolloutConfig
from rl.types import Completion, Prompt
from trainer.doctor.comparisons import Comparisons
from trainer.model.forbidden import load_forbidden
from trainer.model.policy import Policy, load

ROOT = Path(__file__).parents[2]
ENDS = (4, 9, 17, 25, 33, 41, 52, 60)
"""More tokens that end a reply: the model's own EOS alone is rarely sampled."""
RULES = RolloutConfig(
    max_tokens=40,
    max_model_len=320,
    max_num_seqs=64,
    kv_cache_gib=0.25,
    min_tokens=6,
    stop=("%", "ab"),
    stop_token_ids=ENDS,
    bad_words=("7", "xy", "Q", "abc"),
)
PROMPT = [10, 11, 12, 13]
PROMPTS = [f"{a} plus {7 * a % 10} is" for a in range(8)]


@pytest.fixture(scope="module")
def pair(live: Callable, tiny: Callable) -> Pair:
    """One engine and one learner of a run at T = 1.5 that forbids tokens and stops in every way."""
    config = engine_config(tiny(), temperature=1.5, rollout=RULES, doctor="full")
    return Pair(config, live(config, version=-1, load_format="dummy"), make_learner(config))


@pytest.fixture(scope="module")
def replies(pair: Pair) -> list[Completion]:
    pair.version += 1
    pair.learner.connect(pair)
    pair.learner.publish(pair.version, False)
    return pair.live.sample(PROMPT, 64, 3)


def gaps(policy: Policy, replies: list[Completion]) -> torch.Tensor:
    """|trainer - engine| in nats of every sampled token."""
    prompt = Prompt(ordinal=0, token_ids=PROMPT, task={})
    batch = collate([trajectory(prompt, c, 0.0, {}) for c in replies])
    with torch.no_grad():
        return (policy(batch.input_ids, batch.mask, 1.5).logprobs - batch.rollout_logprobs)[batch.mask].abs()


def test_no_reply_ends_too_early_and_none_holds_a_bad_word(pair: Pair, replies: list[Completion]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.config.model)
    ids = tokenizer.convert_tokens_to_ids
    assert min(len(c.token_ids) for c in replies) >= 6
    assert not any({1, *ENDS} & set(c.token_ids[:6]) for c in replies)
    assert not any({ids("7"), ids("Q")} & set(c.token_ids) for c in replies)
    assert not any((ids("x"), ids("y")) in pairwise(c.token_ids) for c in replies)
    assert any(ids("y") in c.token_ids for c in replies), "the end of a bad word is free elsewhere"


def test_a_reply_ends_at_a_stop_token_or_with_a_stop_text_and_keeps_it(pair: Pair, replies: list[Completion]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.config.model)
    ended = [c for c in replies if c.finish_reason == "stop"]
    lasts = {"token": 0, "%": 0, "other": 0}
    for c in ended:
        text = tokenizer.decode(c.token_ids, skip_special_tokens=False)
        kind = "token" if c.token_ids[-1] in {1, *ENDS} else "%" if text.endswith("%") else "other"
        lasts[kind] += 1
        assert len(c.logprobs) == len(c.versions) == len(c.token_ids)
        assert "%" not in text[6:-1], "the text before its end holds no stop text, but where min_tokens protects it"
    assert lasts["token"] > 5
    assert lasts["%"] > 0


def test_the_trainer_agrees_with_the_engine_on_what_is_left_to_sample(pair: Pair, replies: list[Completion]) -> None:
    policy = pair.learner.parts.policy
    d = gaps(policy, replies)
    assert len(d) > 500
    assert d.max() <= 1e-4
    assert d.mean() <= 1e-5
    # Neither of the two rules can be left out.
    rules = policy.forbidden
    assert rules is not None
    try:
        for less in (replace(rules, min_tokens=0), replace(rules, words=())):
            policy.forbidden = less
            assert gaps(policy, replies).mean() > 1e-3
    finally:
        policy.forbidden = rules


def test_the_doctor_finds_nothing_and_names_an_engine_that_forbids_something_else(pair: Pair) -> None:
    def findings(seed: int) -> list[str]:
        pair.version += 1
        one = examiner(pair, PROMPTS, seed=seed)
        check = asyncio.run(one.examine(pair.version))
        assert check.evidence.samples[0].gap.tokens > 100
        return [f.cause for f in check.findings]

    assert findings(0) == []
    with in_sampling(pair.live, bad_words=[]):
        assert findings(1)[0] == "forbidden"
    with in_sampling(pair.live, min_tokens=0):
        assert findings(2)[0] == "forbidden"
    one = examiner(pair, PROMPTS, seed=3)
    pair.version += 1
    asyncio.run(one.examine(pair.version))
    conditions = Comparisons(one)
    asyncio.run(conditions.run_all(pair.version))
    pair.version += 1
    assert conditions.findings == []


@pytest.mark.nightly
def test_under_truncation_the_trainer_cuts_what_is_left(live: Callable, tiny: Callable) -> None:
    cut = replace(RULES, top_p=0.9, top_k=30, min_p=0.01)
    config = engine_config(tiny(), temperature=1.5, rollout=cut)
    engine: Live = live(config)
    policy = load(config.model, dtype="float32", fp32_head=True, share_prompts=True)
    policy.forbidden = load_forbidden(config, config.model)
    prompt = Prompt(ordinal=0, token_ids=PROMPT, task={})
    batch = collate([trajectory(prompt, c, 0.0, {}) for c in engine.sample(PROMPT, 32, 5)])
    with torch.no_grad():
        said = policy(batch.input_ids, batch.mask, 1.5, cut.truncation).logprobs
    d = (said - batch.rollout_logprobs)[batch.mask].abs()
    ties = d > 1e-3  # a rank at the boundary that one side's rounding moves
    assert ties.sum() <= 2
    assert d[~ties].mean() <= 1e-5
    # A greedy evaluation forbids the same.
    (best,) = engine.sample(PROMPT, 1, 5, temperature=0.0)
    assert not {1, *ENDS} & set(best.token_ids[:6])


def test_bad_words_are_spelled_as_vllm_spells_them(tiny: Callable) -> None:
    from vllm import SamplingParams

    from rl.sampling.forbidden import word_ids

    words = ["no", " yes", "New York", "7", "</answer>", "naïve", "the the"]
    for model in (ROOT / "models" / "smollm2-135m", tiny()):
        from vllm.tokenizers import get_tokenizer

        tokenizer = get_tokenizer(str(model))
        params = SamplingParams(bad_words=words)
        params.update_from_tokenizer(tokenizer)
        ours = word_ids(AutoTokenizer.from_pretrained(model), words)
        assert [list(word) for word in ours] == params.bad_words_token_ids
        assert len(ours) > len(words) - 1
