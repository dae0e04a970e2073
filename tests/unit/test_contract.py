"""The contract checker: every objective of ours keeps the contract, and every planted mistake is named."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from rl.contract.check import assert_objective, check_objective
from rl.objectives import CISPO, FAMILY, GRPO, GSPO, M2PO, PPO, ReinforcePP, clipped_surrogate
from rl.objectives.advantages import spread
from rl.objectives.ratios import ratio_of
from rl.reduce import masked_mean
from trainer.cli import main


def broken(objective):
    return {f.check for f in check_objective(objective)}


VARIANTS = [
    *(each(kl_coef=0.1, entropy_coef=0.01) for each in (GRPO, GSPO, CISPO, PPO, M2PO)),
    *(each(kl_coef=0.1, kl_in="reward", kl_estimator="k1") for each in (GRPO, PPO, ReinforcePP)),
    *(each(dual_clip=3.0) for each in (GRPO, GSPO, PPO)),
]


@pytest.mark.parametrize("make", FAMILY, ids=lambda m: m.__name__)
def test_every_objective_of_ours_keeps_the_contract(make):
    assert not [str(f) for f in check_objective(make())]


@pytest.mark.parametrize("objective", VARIANTS, ids=lambda o: type(o).__name__)
def test_no_setting_breaks_the_contract(objective):
    assert not [str(f) for f in check_objective(objective, seed=1)]


# -- planted mistakes --------------------------------------------------------------------------------------------------


def planted(**methods):
    """GRPO with its clip wide open and one method that is wrong."""
    namespace = {"__annotations__": {}, **methods}
    cls = dataclass(frozen=True, kw_only=True)(type("Planted", (GRPO,), namespace))
    return cls(clip_low=0.9, clip_high=9.0)


def log_ratio(policy, batch):
    return policy.logprobs - batch.old_logprobs


def right(self, policy, batch, advantages):
    return -ratio_of(log_ratio(policy, batch)) * advantages, {}


def own_average(self, policy, batch, advantages):
    return right(self, policy, batch, advantages)[0] / batch.mask.sum(dim=1, keepdim=True).clamp(min=1), {}


def sum_over_the_sequence(self, policy, batch, advantages):
    s = (log_ratio(policy, batch) * batch.mask).sum(dim=1)
    return clipped_surrogate(spread(s, batch.mask), advantages, 0.9, 9.0)


def forgotten_mask(self, policy, batch, advantages):
    s = log_ratio(policy, batch).mean(dim=1)
    return clipped_surrogate(spread(s, batch.mask), advantages, 0.9, 9.0)


def divided_by_the_rows_at_hand(self, policy, batch, advantages):
    return right(self, policy, batch, advantages)[0] / len(batch.rewards), {}


def divided_by_the_tokens_at_hand(self, policy, batch, advantages):
    return right(self, policy, batch, advantages)[0] / batch.mask.sum().clamp(min=1), {}


def whitened_in_the_micro_batch(self, policy, batch, advantages):
    here = advantages[batch.mask]
    scaled = advantages / (here.std(unbiased=False) + 1e-6) if len(here) else advantages
    return right(self, policy, batch, scaled)


def wrong_sign(self, policy, batch, advantages):
    return -right(self, policy, batch, advantages)[0], {}


def detached(self, policy, batch, advantages):
    return -ratio_of(log_ratio(policy, batch).detach()) * advantages, {}


def half_detached(self, policy, batch, advantages):
    return -ratio_of(log_ratio(policy, batch)).detach() * advantages * policy.logprobs, {}


def nan_without_tokens(self, policy, batch, advantages):
    s = (log_ratio(policy, batch) * batch.mask).sum(dim=1) / batch.mask.sum(dim=1)
    return clipped_surrogate(s[:, None] * torch.ones_like(advantages), advantages, 0.9, 9.0)


def overflowing(self, policy, batch, advantages):
    ratio = log_ratio(policy, batch).exp()
    return torch.max(-ratio * advantages, -ratio.clamp(0.1, 10.0) * advantages), {}


def penalised(self, policy, batch, advantages):
    return right(self, policy, batch, advantages)[0] + 0.1 * log_ratio(policy, batch) ** 2, {}


def noisy(self, policy, batch, advantages):
    return right(self, policy, batch, advantages)[0] + torch.rand(()), {}


@pytest.mark.parametrize(
    ("method", "check"),
    [
        (own_average, "policy gradient"),
        (sum_over_the_sequence, "policy gradient"),
        (forgotten_mask, "mask"),
        (divided_by_the_rows_at_hand, "micro-batches"),
        (divided_by_the_tokens_at_hand, "ranks"),
        (whitened_in_the_micro_batch, "micro-batches"),
        (wrong_sign, "sign"),
        (detached, "policy gradient"),
        (half_detached, "finite differences"),
        (nan_without_tokens, "empty mask"),
        (overflowing, "extreme ratios"),
        (penalised, "zero advantage"),
        (noisy, "pure"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_planted_mistake_in_the_loss_is_named(method, check):
    assert check in broken(planted(loss=method))


def test_the_loss_that_the_mistakes_were_planted_in_is_right():
    assert not check_objective(planted(loss=right))


def test_a_violation_shows_what_the_mistake_looks_like_and_how_to_fix_it():
    said = {
        m.__name__: " ".join(map(str, check_objective(planted(loss=m)))) for m in (own_average, wrong_sign, detached)
    }
    assert "divided by the length of its sequence once more. Do not average yourself" in said["own_average"]
    assert "it has the wrong sign. loss is minimised: return -ratio * advantages" in said["wrong_sign"]
    assert "there is none. The loss does not depend on policy.logprobs" in said["detached"]


# -- advantages --------------------------------------------------------------------------------------------------------


def groups_by_position(self, batch):
    pairs = batch.rewards.reshape(-1, 2)
    return spread((pairs - pairs.mean(dim=1, keepdim=True)).flatten(), batch.mask)


def mean_of_the_step(self, batch):
    return spread(batch.rewards - batch.rewards.mean(), batch.mask)


def in_place(self, batch):
    batch.rewards.sub_(batch.rewards.mean())
    return GRPO().advantages(batch)


def mean_with_padding(self, batch):
    length = torch.full_like(batch.rewards, batch.mask.shape[1])
    return spread(GRPO().advantages(batch).sum(dim=1) / length, batch.mask)


@pytest.mark.parametrize(
    ("method", "found"),
    [
        (groups_by_position, {"groups", "row order"}),
        (mean_of_the_step, {"groups"}),
        (mean_with_padding, {"mask"}),
        (in_place, {"pure"}),
        (lambda self, batch: batch.rewards, {"shape"}),
        (lambda self, batch: batch.rewards[:, None], {"shape"}),
        (lambda self, batch: batch.mask.float().mean(dim=0), {"shape"}),
        (lambda self, batch: batch.old_logprobs - batch.rollout_logprobs, {"declares"}),
        (lambda self, batch: batch.rewards * batch.mask, {"runs"}),
    ],
    ids=["by position", "step mean", "padded mean", "in place", "[B]", "[B, 1]", "[T]", "old", "broadcast"],
)
def test_a_planted_mistake_in_the_advantages_is_named(method, found):
    assert broken(planted(advantages=method)) == found


@pytest.mark.parametrize(
    ("reads", "flag"),
    [
        (lambda policy, batch: batch.ref_logprobs, "uses_reference"),
        (lambda policy, batch: batch.values, "uses_values"),
        (lambda policy, batch: policy.values, "uses_values"),
    ],
)
def test_what_a_loss_reads_without_declaring_it_is_named_with_its_flag(reads, flag):
    def loss(self, policy, batch, advantages):
        plain, metrics = right(self, policy, batch, advantages)
        return plain + 0.01 * (policy.logprobs - reads(policy, batch).detach()) ** 2, metrics

    (violation,) = check_objective(planted(loss=loss))
    assert violation.check == "declares"
    assert f"Declare `{flag}: ClassVar[bool] = True`" in violation.remedy
    assert "loss(policy, batch, advantages) reads" in violation.what


def test_a_baseline_other_than_the_group_can_be_declared():
    assert not broken(planted(advantages=mean_of_the_step, group_relative=False))
    assert not broken(planted(loss=penalised, skippable=False))
    assert not broken(planted(loss=half_detached, stop_gradient=True))


# -- shapes and metrics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reduce",
    [lambda x: x.mean(), lambda x: x.sum(dim=1), lambda x: x.sum(dim=1, keepdim=True), lambda x: x.mean(dim=0)],
)
def test_a_loss_of_another_shape_is_named(reduce):
    def loss(self, policy, batch, advantages):
        return reduce(right(self, policy, batch, advantages)[0]), {}

    assert broken(planted(loss=loss)) == {"shape"}


@pytest.mark.parametrize(
    ("metric", "found"),
    [
        (lambda r, mask: r.detach(), set()),
        (lambda r, mask: masked_mean(r, mask).detach(), set()),
        (lambda r, mask: r, {"metrics"}),
        (lambda r, mask: r.mean().detach(), {"metrics"}),
        (lambda r, mask: r.mean().detach().expand(len(r)), {"micro-batches", "ranks", "mask"}),
        (lambda r, mask: r.detach() / mask.sum().clamp(min=1), {"micro-batches", "ranks"}),
    ],
    ids=["token", "sequence", "graph", "reduced", "reduced and spread", "own denominator"],
)
def test_metrics_have_a_shape_no_graph_and_no_denominator_of_their_own(metric, found):
    def loss(self, policy, batch, advantages):
        return right(self, policy, batch, advantages)[0], {
            "mine": metric(ratio_of(log_ratio(policy, batch)), batch.mask)
        }

    assert broken(planted(loss=loss)) == found


def test_the_value_loss_is_held_to_the_same_checks():
    @dataclass(frozen=True, kw_only=True)
    class Averaged(PPO):
        def loss(self, policy, batch, advantages):
            loss, metrics = super().loss(policy, batch, advantages)
            return loss + (policy.values - 1.0) ** 2 / len(batch.rewards), metrics

    assert "micro-batches" in broken(Averaged())


def test_the_helper_for_tests_raises_with_every_violation():
    assert_objective(GSPO())
    with pytest.raises(AssertionError, match=r"Planted breaks its contract:\n- sign: .*\n- policy gradient: "):
        assert_objective(planted(loss=wrong_sign))


def test_an_objective_may_not_be_loud_only_at_its_default():
    assert not broken(replace(GSPO(), clip_low=0.2, clip_high=0.2))
    assert_objective(replace(PPO(), value_clip=0.01, lam=1.0))


# -- at the user's end -------------------------------------------------------------------------------------------------


def example_of_the_docs(folder, mistake=""):
    """The objective that docs/objectives.md shows, as a user's file."""
    page = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert mistake in code
    path = folder / f"mine_{len(mistake)}.py"
    path.write_text(code.replace("return -ratio", "return ratio") if mistake else code)
    return path


def command(*arguments, monkeypatch):
    """The exit status of `unison ...`."""
    monkeypatch.setattr("sys.argv", ["unison", *arguments])
    monkeypatch.setattr("sys.path", list(sys.path))
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_the_example_of_the_docs_is_short_and_keeps_the_contract(tmp_path, monkeypatch, capsys):
    path = example_of_the_docs(tmp_path)
    assert len(path.read_text().splitlines()) < 30
    assert command("check-objective", f"{path}:Bounded", monkeypatch=monkeypatch) == 0
    assert "Bounded keeps the contract" in capsys.readouterr().out


def test_the_command_ends_with_1_and_a_table_when_something_is_wrong(tmp_path, monkeypatch, capsys):
    path = example_of_the_docs(tmp_path, mistake="return -ratio")
    assert command("check-objective", f"{path}:Bounded", monkeypatch=monkeypatch) == 1
    said = capsys.readouterr().out
    assert "Bounded breaks its contract" in said
    assert "policy gradient" in said
    assert "how to fix it" in said


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing.py:Mine", "there is no file 'nothing.py'"),
        ("GRPPO", "GRPPO is no objective; rl.objectives has CISPO, DAPO"),
        ("rl.config:Config", "rl.config:Config is no objective; rl.config has GSPO, Objective"),
    ],
)
def test_what_cannot_be_checked_ends_with_2_and_the_reason(target, message, monkeypatch, capsys):
    assert command("check-objective", target, monkeypatch=monkeypatch) == 2
    assert message in " ".join(capsys.readouterr().out.split())
