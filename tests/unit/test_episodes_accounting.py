"""An episode counts once, in however many rows it travels: advantages, losses, averages, micro-batches and metrics."""

import math
import random
from dataclasses import dataclass, fields, replace

import pytest
import torch

from rl.batch import collate, episodes, micro_batches, take, trained_rows
from rl.contract.what_if import evaluate_objective
from rl.episodes.joined import joined, layout
from rl.filters import Difficulty, Overlong, ZeroAdvantage
from rl.loop.step_metrics import batch_metrics
from rl.loss import full_loss, prepare
from rl.objectives import FAMILY, GRPO, GSPO, PPO, RLOO, GiGPO, ReinforcePP
from rl.objectives.corrections import MIS, GeometricMask, SequenceTIS, TokenTIS, Uncorrected
from rl.parity.mismatch import finish, mismatch
from rl.reduce import Meter, Totals, loss_weights
from rl.types import PolicyOutput, Trajectory, step_of
from trainer.runs.records import Record, load, save

# -- episodes by hand, and their cuts into rows ------------------------------------------------------------------------


@dataclass
class Turn:
    given: list[int]
    sampled: list[int]
    paid: float


@dataclass
class Played:
    """An episode: its turns in the order of time."""

    group: int
    member: int
    turns: list[Turn]


def play(seed=0):
    """Four groups of three episodes of one to five turns; all episodes of the last group are alike in their reward."""
    rng, out = random.Random(seed), []
    for group in range(4):
        prompt = [rng.randrange(3, 90) for _ in range(2 + group)]
        for member in range(3):
            turns = []
            for k in range(rng.randint(1, 5)):
                given = prompt if k == 0 else [rng.randrange(3, 5) for _ in range(rng.randint(1, 2))]
                sampled = [rng.randrange(3, 90) for _ in range(rng.randint(1, 4))]
                turns.append(Turn(given, sampled, rng.choice([0.0, 0.25, 1.0]) if group < 3 else 0.0))
            if group == 3:
                turns[-1].paid = 0.7
            out.append(Played(group, member, turns))
    return out


CUTS = {
    "one row": lambda k: 0,
    "two rows": lambda k: int(k >= 2),
    "a row for each turn": lambda k: k,
    "two agents that take turns": lambda k: k % 2,
}


def number(kind, place, size=0.3):
    return random.Random(f"{kind} {place}").gauss(0.0, size)


def rows_of(episode, row_of, *, edited=False, by_turn=True):
    """The rows of an episode, and the (member, turn, token) of each of their tokens. A row holds the whole history, or,
    where it was edited, the prompt and its own turns alone."""
    out = []
    for row in range(max(map(row_of, range(len(episode.turns)))) + 1):
        mine = [k for k in range(len(episode.turns)) if row_of(k) == row]
        tokens, places, turns, paid = [], [], [], []
        for k in range(max(mine) + 1):
            turn = episode.turns[k]
            if edited and k and k not in mine:
                continue
            tokens += turn.given
            places += [None] * len(turn.given)
            turns += [-1] * len(turn.given)
            if edited and k not in mine:
                continue
            tokens += turn.sampled
            if k not in mine:
                places += [None] * len(turn.sampled)
                turns += [-1] * len(turn.sampled)
                continue
            places += [(episode.group, episode.member, k, i) for i in range(len(turn.sampled))]
            turns += [k] * len(turn.sampled)
            paid.append((len(tokens) - 1, turn.paid))
        trajectory = Trajectory(
            group=episode.group,
            episode=episode.member,
            row=row,
            token_ids=tokens,
            mask=[p is not None for p in places],
            logprobs=[0.0 if p is None else -2.0 + number("rollout", p) for p in places],
            versions=[-1 if p is None else p[2] for p in places],
            reward=sum(turn.paid for turn in episode.turns),
            turns=turns,
            paid=tuple(paid) if by_turn else None,
        )
        out.append((trajectory, places))
    return out


@dataclass
class Scene:
    """A step and the policy on it; `places[b][t]` is the token at that column."""

    batch: object
    policy: PolicyOutput
    places: list

    def by_place(self, x):
        """The numbers of [B, T] by token."""
        found = {p: float(x[b, t]) for b, row in enumerate(self.places) for t, p in enumerate(row) if p is not None}
        assert len(found) == int(self.batch.mask.sum()), "a token was sampled in two rows"
        return found


def scene_of(played, row_of, *, edited=False, by_turn=True, shuffled=True):
    rows = [pair for e in played for pair in rows_of(e, row_of, edited=edited, by_turn=by_turn)]
    if shuffled:
        random.Random(5).shuffle(rows)
    batch = collate([t for t, _ in rows])
    places = [p[1:] for _, p in rows]

    def column(kind, mean, size=0.3):
        out = torch.zeros(batch.mask.shape)
        for b, row in enumerate(places):
            for t, p in enumerate(row):
                if p is not None:
                    out[b, t] = mean + number(kind, p, size)
        return out

    batch = replace(
        batch, old_logprobs=column("old", -2.0), ref_logprobs=column("ref", -2.0), values=column("value", 0.3)
    )
    policy = PolicyOutput(logprobs=column("now", -2.0), entropy=column("h", 2.0), values=column("v", 0.3))
    return Scene(batch, policy, places)


def learned(objective, scene, correction=None, *, ranks=1, budget=10**6, share=False):
    """What the trainer makes of a scene: loss, advantages and gradients by token, and the means of its metrics."""
    correction = correction or Uncorrected()
    batch, advantages = prepare(objective, scene.batch)
    rows = trained_rows(batch)
    totals = Totals(tokens=int(batch.mask.sum()), sequences=len(episodes(batch, rows)), horizon=32)
    now = scene.policy.logprobs.clone().requires_grad_()
    total, meter = torch.zeros(()), Meter()
    for rank in micro_batches(batch, rows, ranks=ranks, budget=budget, share_prompts=share):
        for micro in rank:
            part = take(batch, micro)
            chosen, width = (micro if len(micro) else torch.zeros(1, dtype=torch.long)), part.mask.shape[1]
            mine = {f.name: getattr(scene.policy, f.name)[chosen, :width] for f in fields(PolicyOutput)}
            policy = PolicyOutput(**mine | {"logprobs": now[chosen, :width]})
            given = advantages[chosen, :width] * part.mask
            part, policy, given = joined(part, policy, given)
            loss, metrics = full_loss(objective, correction, policy, part, given)
            weights = loss_weights(part.mask, objective.average_over, totals)
            total = total + torch.where(part.mask, loss * weights, 0.0).sum()
            meter.add(metrics, part.mask)
    total.backward()
    return float(total.detach()), scene.by_place(advantages), scene.by_place(now.grad), finish(meter.means())


def assert_same(got, want):
    assert got[0] == pytest.approx(want[0], abs=1e-6)
    assert got[1] == pytest.approx(want[1], abs=1e-6)
    assert got[2] == pytest.approx(want[2], abs=1e-6)
    assert got[3] == pytest.approx(want[3], abs=1e-5, rel=1e-4)


PLAYED = play()
WHOLE = scene_of(PLAYED, CUTS["one row"], shuffled=False)
WIDE = {"GSPO": {"clip_low": 0.1, "clip_high": 0.15}}
"""Clip ranges at which some episodes are clipped and some are not."""


def test_the_episodes_are_not_trivial():
    turns = [len(e.turns) for e in PLAYED]
    assert {1, 5} <= set(turns)
    assert WHOLE.batch.episode_ids is None
    assert len(scene_of(PLAYED, CUTS["a row for each turn"]).places) == sum(turns)
    clipped = learned(GSPO(**WIDE["GSPO"]), WHOLE)[3]["actor/clip_frac"]
    assert 0.05 < clipped < 0.95


# -- the law: in however many rows, the same ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("average_over", ["tokens", "sequences", "constant"])
@pytest.mark.parametrize("make", FAMILY, ids=lambda m: m.__name__)
def test_no_cut_of_an_episode_into_rows_changes_what_is_learned(make, average_over):
    objective = make(average_over=average_over, **WIDE.get(make.__name__, {}))
    want = learned(objective, WHOLE)
    assert max(map(abs, want[1].values())) > 0.1
    for row_of in CUTS.values():
        for ranks, budget, share in ((1, 10**6, False), (3, 20, True)):
            got = learned(objective, scene_of(PLAYED, row_of), ranks=ranks, budget=budget, share=share)
            assert_same(got, want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "correction"),
    [
        (GRPO(kl_coef=0.3, kl_in="reward", kl_estimator="k1"), None),
        (ReinforcePP(kl_coef=0.3, turn_gamma=0.8), None),
        (PPO(kl_coef=0.1, kl_in="reward", kl_estimator="k1", gamma=0.97, lam=0.9, turn_gamma=0.7), None),
        (GiGPO(turn_gamma=0.7, turn_weight=0.5, kl_coef=0.2), None),
        (GRPO(entropy_coef=0.1, entropy_in="advantages"), SequenceTIS(cap=1.5)),
        (GSPO(clip_low=0.1, clip_high=0.15), MIS(low=0.4, high=2.5)),
        (GRPO(average_over="sequences"), GeometricMask(low=0.9, high=1.1)),
        (RLOO(kl_coef=0.1), TokenTIS(cap=1.2)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("cut", ["two rows", "a row for each turn", "two agents that take turns"])
def test_nor_does_it_with_a_kl_a_discount_or_a_correction_by_episode(objective, correction, cut):
    want = learned(objective, WHOLE, correction)
    for ranks, budget, share in ((1, 10**6, False), (2, 15, False)):
        got = learned(objective, scene_of(PLAYED, CUTS[cut]), correction, ranks=ranks, budget=budget, share=share)
        assert_same(got, want)


@pytest.mark.parametrize("objective", [m() for m in FAMILY if m is not GiGPO], ids=lambda o: type(o).__name__)
def test_nor_does_it_where_the_history_was_edited(objective):
    # For GiGPO an edited history is another state.
    got = learned(objective, scene_of(PLAYED, CUTS["two agents that take turns"], edited=True))
    assert_same(got, learned(objective, WHOLE))


def test_a_reward_without_turns_of_its_own_is_paid_once_at_the_last_token():
    objective = PPO(gamma=0.9)
    want = learned(objective, scene_of(PLAYED, CUTS["one row"], by_turn=False))
    for row_of in CUTS.values():
        scene = scene_of(PLAYED, row_of, by_turn=False)
        assert_same(learned(objective, scene), want)
        if scene.batch.token_rewards is None:
            continue
        ends = {(e.group, e.member, len(e.turns) - 1, len(e.turns[-1].sampled) - 1) for e in PLAYED}
        assert {p for p, paid in scene.by_place(scene.batch.token_rewards).items() if paid} <= ends
        assert scene.batch.token_rewards.sum() == pytest.approx(sum(t.paid for e in PLAYED for t in e.turns), abs=1e-5)


# -- by hand -----------------------------------------------------------------------------------------------------------

# Two agents of one episode: the first samples 11 and then 13 14, the second 12 in between. The other episode has a row.
FIRST = Trajectory(
    group=4,
    episode=1,
    row=0,
    token_ids=[1, 11, 5, 13, 14],
    mask=[False, True, False, True, True],
    logprobs=[0.0, -1.0, 0.0, -1.0, -1.0],
    versions=[-1, 0, -1, 0, 0],
    reward=3.0,
    turns=[-1, 0, -1, 2, 2],
)
SECOND = replace(
    FIRST,
    row=1,
    token_ids=[2, 12],
    mask=[False, True],
    logprobs=[0.0, -1.0],
    versions=[-1, 1],
    turns=[-1, 1],
)
OTHER = replace(SECOND, episode=0, row=0, token_ids=[1, 15], turns=[-1, 0], reward=1.0, finish_reason="length")
HAND = collate([FIRST, OTHER, SECOND])


def test_the_columns_of_episodes_on_literal_tokens():
    assert HAND.episode_ids.tolist() == [0, 1, 0]
    assert HAND.turns.tolist() == [[0, -1, 2, 2], [0, -1, -1, -1], [1, -1, -1, -1]]
    assert HAND.token_rewards.tolist() == [[0, 0, 0, 3], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert HAND.rewards.tolist() == [3.0, 1.0, 3.0]
    paid = collate([replace(FIRST, paid=((1, 0.5), (4, 2.0))), OTHER, replace(SECOND, paid=((1, 0.5),))])
    assert paid.token_rewards.tolist() == [[0.5, 0, 0, 2], [1, 0, 0, 0], [0.5, 0, 0, 0]]


def test_episodes_of_one_row_and_one_turn_have_none_of_these_columns():
    plain = collate([OTHER, replace(OTHER, episode=1)])
    assert (plain.episode_ids, plain.turns, plain.states, plain.token_rewards) == (None,) * 4
    assert layout(plain) is None


def test_what_cannot_be_is_refused():
    with pytest.raises(AssertionError, match=r"group 4, episode 1 has the rows \[0, 2\]"):
        collate([FIRST, replace(SECOND, row=2)])
    with pytest.raises(AssertionError, match="group 4, episode 1: rows without their turns have no order of time"):
        collate([FIRST, replace(SECOND, turns=None)])
    with pytest.raises(AssertionError, match="group 4: token 0 is paid, and was not sampled"):
        collate([replace(FIRST, paid=((0, 3.0),)), SECOND])
    with pytest.raises(AssertionError, match=r"2\.5 was paid of a reward of 3"):
        collate([replace(FIRST, paid=((1, 2.5),)), SECOND])


def test_an_episode_becomes_one_row_in_the_order_of_time():
    at = layout(HAND)
    kept = torch.stack([HAND.input_ids[:, 1:], torch.full(HAND.mask.shape, 99)], dim=-1)
    row = at.batch(replace(HAND, support=kept))
    nothing = [-1, -1]
    assert row.support.tolist() == [[[11, 99], [12, 99], [13, 99], [14, 99]], [[15, 99], nothing, nothing, nothing]]
    assert row.input_ids.tolist() == [[1, 11, 12, 13, 14], [1, 15, 0, 0, 0]]
    assert row.mask.tolist() == [[True] * 4, [True, False, False, False]]
    assert row.versions.tolist() == [[0, 1, 0, 0], [1, -1, -1, -1]]
    assert row.turns.tolist() == [[0, 1, 2, 2], [0, -1, -1, -1]]
    assert (row.rewards.tolist(), row.group_ids.tolist(), row.episode_ids) == ([3.0, 1.0], [4, 4], None)
    back = at.rows(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 9.0, 9.0, 9.0]]))
    assert back.tolist() == [[1, 0, 3, 4], [5, 0, 0, 0], [2, 0, 0, 0]]


def test_a_baseline_counts_an_episode_once():
    # The mean of 3 and 1 is 2; with the row of the second agent it would be 7/3.
    _, got = prepare(GRPO(divide_by_std=False), HAND)
    assert got.tolist() == [[1, 0, 1, 1], [-1, 0, 0, 0], [1, 0, 0, 0]]
    _, got = prepare(RLOO(), HAND)
    assert got.tolist() == [[2, 0, 2, 2], [-2, 0, 0, 0], [2, 0, 0, 0]]


def test_gae_follows_the_tokens_of_both_agents_in_the_order_of_time():
    values = torch.tensor([[0.1, 0.0, 0.3, 0.4], [0.5, 0.0, 0.0, 0.0], [0.2, 0.0, 0.0, 0.0]])
    objective = PPO(gamma=0.9, lam=0.5)
    at = layout(HAND)
    got = objective._raw(at.batch(replace(HAND, values=values)))
    want, following, next_value = [], 0.0, 0.0
    for reward, value in zip((3, 0, 0, 0), (0.4, 0.3, 0.2, 0.1), strict=True):
        following = reward + 0.9 * next_value - value + 0.9 * 0.5 * following
        next_value = value
        want.insert(0, following)
    assert got[0].tolist() == pytest.approx(want)


def test_averaging_over_sequences_gives_an_episode_one_weight_over_all_of_its_tokens():
    one, _, _ = joined(HAND, PolicyOutput(logprobs=HAND.mask.float(), entropy=HAND.mask.float()), HAND.mask.float())
    totals = Totals(tokens=5, sequences=len(episodes(HAND, torch.arange(3))), horizon=8)
    assert loss_weights(one.mask, "sequences", totals)[one.mask].tolist() == pytest.approx([1 / 8] * 4 + [1 / 2])
    assert loss_weights(one.mask, "constant", totals)[one.mask].tolist() == pytest.approx([1 / 16] * 5)


def test_a_kl_in_the_reward_is_subtracted_from_every_row_s_reward():
    old = torch.where(HAND.mask, -1.0, 0.0)
    batch = replace(HAND, old_logprobs=old, ref_logprobs=old - 0.1 * HAND.mask)
    paid, _ = prepare(PPO(kl_coef=1.0, kl_in="reward", kl_estimator="k1"), replace(batch, values=old))
    assert paid.rewards.tolist() == pytest.approx([2.6, 0.9, 2.6])
    assert paid.token_rewards.flatten().tolist() == pytest.approx([-0.1, 0, -0.1, 2.9, 0.9, 0, 0, 0, -0.1, 0, 0, 0])


def test_an_episode_that_is_not_trained_on_counts_in_the_baseline_alone():
    cut = [replace(t, trained=False, paid=((1, t.reward),) if t is FIRST else ()) for t in (FIRST, SECOND)]
    batch = collate([cut[0], OTHER, cut[1]])
    assert trained_rows(batch).tolist() == [1]
    assert not batch.token_rewards[[0, 2]].any()
    _, got = prepare(GRPO(divide_by_std=False), batch)
    assert got.tolist() == [[0, 0, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 0]]


# -- the state of a turn -----------------------------------------------------------------------------------------------


def test_a_state_is_what_the_policy_was_given_since_it_last_sampled():
    def states(*turns, row_of=CUTS["one row"], edited=False):
        episode = Played(0, 0, [Turn(given, sampled, 0.0) for given, sampled in turns])
        scene = scene_of([episode], row_of, edited=edited)
        found = scene.by_place(scene.batch.states)
        return [found[0, 0, k, 0] for k in range(len(turns))]

    turns = ([1, 2], [7]), ([5, 6], [8, 9]), ([5, 6], [7]), ([4], [7])
    whole = states(*turns)
    assert whole[1] == whole[2], "what was sampled before is no part of a state"
    assert len({*whole}) == 3
    assert all(states(*turns, row_of=row_of) == whole for row_of in CUTS.values())
    edited = states(*turns, row_of=lambda k: k, edited=True)
    assert edited[0] == whole[0]
    assert not {*edited[1:]} & {*whole}, "what was edited is another state"


# -- micro-batches and minibatches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("budget", [1, 25, 10**6])
def test_the_rows_of_an_episode_stay_in_one_micro_batch(share, budget):
    batch = scene_of(PLAYED, CUTS["a row for each turn"]).batch
    rows = trained_rows(batch)
    cut = [m for rank in micro_batches(batch, rows, ranks=3, budget=budget, share_prompts=share) for m in rank]
    assert sorted(r for micro in cut for r in micro.tolist()) == rows.tolist()
    homes = {}
    for i, micro in enumerate(cut):
        for episode in batch.episode_ids[micro].tolist():
            homes.setdefault(episode, set()).add(i)
    assert all(len(home) == 1 for home in homes.values())
    assert len(homes) == len(PLAYED)


def prompt_row(group, prompt, replies=1, **more):
    n = len(prompt)
    return Trajectory(
        group=group,
        token_ids=[*prompt, *[9] * replies],
        mask=[False] * n + [True] * replies,
        logprobs=[0.0] * n + [-1.0] * replies,
        versions=[-1] * n + [0] * replies,
        reward=0.0,
        **more,
    )


def test_prompts_of_a_group_that_differ_cost_in_full():
    # Rows of 10 columns: the second of a group costs nothing where its prompt is the first's, else all of its 10.
    alike = [prompt_row(0, [1] * 10), prompt_row(0, [1] * 10)]
    others = [prompt_row(1, [1] * 10), prompt_row(1, [2] * 10)]
    single = prompt_row(2, [3] * 10)

    def micros(*rows, budget):
        (cut,) = micro_batches(collate([*rows]), torch.arange(len(rows)), ranks=1, budget=budget, share_prompts=True)
        return len(cut)

    assert micros(*alike, single, budget=10 + 0 + 10) == 1
    assert micros(*others, single, budget=10 + 0 + 10) == 2
    assert micros(*others, single, budget=30) == 1


def test_minibatches_are_cut_between_episodes():
    found = episodes(HAND, torch.tensor([2, 1, 0]))
    assert [of.tolist() for of in found] == [[2, 0], [1]]
    assert [of.tolist() for of in episodes(collate([OTHER, OTHER]), torch.tensor([1, 0]))] == [[1], [0]]


def test_rows_that_may_be_one_episode_are_not_averaged_by_mistake():
    policy = PolicyOutput(logprobs=HAND.mask.float(), entropy=HAND.mask.float())
    with pytest.raises(AssertionError, match="several rows may be one episode"):
        full_loss(GRPO(), Uncorrected(), policy, HAND, HAND.mask.float())


# -- filters, metrics, records -----------------------------------------------------------------------------------------


def test_filters_see_one_trajectory_of_each_episode():
    group = [FIRST, SECOND, OTHER]  # rewards 3 and 1, one of two cut off
    assert Overlong(above=0.5)(group) is None
    assert Overlong(above=0.4)(group) == "overlong"
    assert Difficulty(low=0.0, high=2.2)(group) is None
    assert Difficulty(low=0.0, high=1.9)(group) == "too_easy"
    assert ZeroAdvantage()([FIRST, SECOND]) == "zero_advantage"
    assert ZeroAdvantage()(group) is None


def test_the_metrics_of_a_step_count_episodes():
    first, second = replace(FIRST, paid=((1, 0.5), (4, 2.0))), replace(SECOND, paid=((1, 0.5),))
    parts = {"right": 1.0}
    rows = [replace(t, reward_parts=parts) for t in (first, second)] + [OTHER]
    got = batch_metrics(rows, 1, group_size=2)
    want = {
        "reward/mean": 2.0,
        "reward/right/mean": 1.0,
        "reward/right/left_out_frac": 0.5,
        "reward/frac_zero_std": 0.0,
        "response_length/mean": 2.5,
        "response_length/max": 4.0,
        "response_length/truncated_frac": 0.5,
        "staleness/versions_per_sample": 1.5,
        "episode/turns": 2.0,
        "episode/turns_max": 3.0,
        "episode/rows": 1.5,
        "reward/turn_0": 0.25,
        "reward/turn_1": 0.5,
        "reward/turn_2": 2.0,
    }
    assert {name: got[name] for name in want} == pytest.approx(want)
    assert not [name for name in batch_metrics([replace(OTHER, turns=None)], 1, group_size=1) if "turn" in name]


def test_the_gap_to_the_engine_is_known_by_turn():
    trainer = torch.where(HAND.mask, HAND.rollout_logprobs, 0.0)
    trainer[0, 0] += 0.3
    trainer[0, 2] -= 0.2  # turn 2, its first token of two
    one, policy, _ = joined(HAND, PolicyOutput(logprobs=trainer, entropy=trainer), trainer)
    meter = Meter()
    for row in range(2):  # a micro-batch for each episode; only one of them has three turns
        part = take(step_of(one, policy.logprobs), torch.tensor([row]))
        meter.add(mismatch(part), part.mask)
    got = {n.removeprefix("rollout_corr/logprob_abs_diff_"): x for n, x in finish(meter.means()).items() if "turn" in n}
    assert got == pytest.approx({"turn/0": 0.15, "turn/1": 0.0, "turn/2": 0.1, "worst_turn": 0.15}, abs=1e-6)


def test_a_number_that_is_nan_is_seen_in_the_worst_turn():
    moments = {"turn/0": 1.0, "turn/1": float("nan")}
    means = {f"rollout_corr/logprob_abs_diff_{n}": x for n, x in moments.items()}
    means |= {"rollout_corr/turn_tokens/0": 1.0, "rollout_corr/turn_tokens/1": 1.0}
    means |= {f"rollout_corr/{n}": 1.0 for n in ("kl", "kl_sq", "k3_kl", "k3_kl_sq", "mult_error", "mult_error_sq")}
    means |= {f"rollout_corr/{n}": 1.0 for n in ("rollout_is_mean", "chi2", "seq_is", "seq_is_sq", "token_count")}
    means |= {"rollout_corr/logprob_abs_diff_mean": 1.0}
    assert math.isnan(finish(means)["rollout_corr/logprob_abs_diff_worst_turn"])


def test_a_record_keeps_the_rows_and_a_comparison_counts_episodes(tmp_path):
    reports = []
    for row_of in (CUTS["one row"], CUTS["a row for each turn"]):
        scene = scene_of(PLAYED, row_of)
        path = tmp_path / f"step-{len(scene.places)}.safetensors"
        save(Record(batch=scene.batch, policy=scene.policy, horizon=32, objective="GRPO"), path)
        kept = load(path)
        for name in ("episode_ids", "turns", "states", "token_rewards"):
            mine, loaded = getattr(scene.batch, name), getattr(kept.batch, name)
            assert (mine is None and loaded is None) or torch.equal(mine, loaded)
        reports.append(evaluate_objective("x", GSPO(**WIDE["GSPO"]), kept.batch, kept.policy, kept.horizon))
    for name in ("loss", "grad_norm", "clip_low", "clip_high", "ess", "effective_tokens"):
        assert getattr(reports[0], name) == pytest.approx(getattr(reports[1], name), abs=1e-5)
