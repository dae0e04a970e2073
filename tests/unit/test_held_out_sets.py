"""Held-out sets with settings of their own: what is refused before anything starts, and what each set is shown."""

from types import SimpleNamespace

import pytest

from episodes import Calculator
from rl.config import Config, RolloutConfig
from rl.environments.types import EnvError, Limits
from rl.loop.players import Episodes
from rl.rewards.score import RewardError
from rl.types import Data, Eval, Example
from tiny_tokenizer import CHAT, make_tokenizer
from trainer import prompts
from trainer.episodes import episodes_of, held_out_sets
from trainer.prompts import prepare, read
from trainer.runs.own_code import code_digests

# The types that users get wrong are checked by `Config` itself.
pytestmark = pytest.mark.usefixtures("unchecked_types")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("model"), chat_template=CHAT)


ONE = Example(prompt=[{"role": "user", "content": "2*3+4"}], task={"answer": "10"})


def config(model="m", evals=None, means=None, **settings):
    rollout = RolloutConfig(max_tokens=8, max_model_len=200)
    reward = {} if "env" in settings else {"reward": lambda reply: 0.0}
    data = Data(train=[ONE], evals=evals or {}, means=means or {})
    return Config(name="t", model=model, data=data, rollout=rollout, **reward, **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"samples": 0}, r"samples=0 must be at least 1 \(in Eval\)"),
        ({"every": -1}, "every=-1 must be at least 0"),
        ({"temperature": -0.5}, "temperature=-0.5 must be at least 0"),
        ({"samples": "4"}, r"samples='4' must be an integer or None \(in Eval\)"),
        ({"env": Calculator, "reward": len}, "Eval: reward scores single replies, and env=Calculator plays"),
        ({"env": Calculator, "answer": len}, "Eval: answer reads single replies, and env=Calculator plays"),
        ({"examples": ["2+3="]}, "must be a list of Example: write Eval"),
    ],
)
def test_a_wrong_set_is_refused_when_it_is_made(settings, says):
    with pytest.raises(ValueError, match=says):
        Eval(**{"examples": [ONE]} | settings)


class Broken(Calculator):
    def reward(self, episode):
        raise KeyError("judge")


@pytest.mark.parametrize(
    ("evals", "settings", "error", "says"),
    [
        ({"hard": Eval(examples=[])}, {}, ValueError, "the evaluation set 'hard' is empty"),
        ({"hard": Eval(examples=[ONE], reward=lambda reply: "right")}, {}, RewardError, "the reward of prompt 0"),
        ({"hard": Eval(examples=[ONE], answer=lambda reply: [])}, {}, RewardError, "as answer"),
        (
            {"hard": Eval(examples=[ONE], answer=len)},
            {"env": Calculator},
            ValueError,
            "give the set a reward of its own",
        ),
        ({"hard": Eval(examples=[ONE], env=Broken)}, {}, EnvError, "judge"),
        ({"hard": Eval(examples=[ONE], limits={"turns": 2})}, {}, ValueError, "the set has single replies: give it an"),
        (
            {"hard": Eval(examples=[ONE], limits={"turns": 2}, reward=len)},
            {"env": Calculator},
            ValueError,
            "the set has single replies",
        ),
        (
            {"hard": Eval(examples=[ONE], limits={"turns": 0})},
            {"env": Calculator},
            ValueError,
            r"data.evals\['hard'\]: limits.turns=0 must be at least 1",
        ),
        (
            {"hard": Eval(examples=[ONE], limits={"steps": 3})},
            {"env": Calculator},
            ValueError,
            "limits has no 'steps', only turns, tokens, seconds, tool_s",
        ),
        ({"hard": Eval(examples=[ONE], env=SimpleNamespace)}, {}, ValueError, "SimpleNamespace has no reward"),
        (
            {"hard": Eval(examples=[Example(prompt="2+3=")], env=Calculator)},
            {},
            ValueError,
            r"data.evals\['hard'\]\[0\] is '2\+3='",
        ),
    ],
)
def test_a_set_that_cannot_be_scored_is_found_before_anything_starts(model, evals, settings, error, says):
    with pytest.raises(error, match=says):
        prepare(config(model, evals, **settings))


def planned(model, monkeypatch, *, learners=1, hard_every=0, means=None, **settings):
    hard = Eval(examples=[ONE], samples=4, every=hard_every, answer=lambda reply: reply.text)
    monkeypatch.setattr(prompts.Plan, "check_model", lambda self: None)
    placement = SimpleNamespace(learners=learners)
    given = config(model, {"easy": [ONE], "hard": hard}, means=means or {}, **settings)
    return read(prompts.Plan(config=given, placement=placement, gpus=0))


def test_the_best_model_is_chosen_by_a_figure_that_is_measured_again_and_again(model, monkeypatch):
    known = r"easy/avg@2, easy/pass@1, easy/pass@2, hard/avg@4, hard/pass@1, hard/pass@2, hard/pass@4, hard/maj@4"
    both = {"eval_every": 5, "eval_samples": 2}
    planned(model, monkeypatch, keep_best="easy/pass@2", **both)
    for figure in ("easy/avg@4", "easy", "hard/avg@2"):
        with pytest.raises(ValueError, match=f"keep_best='{figure}' is no figure of a held-out set: {known}"):
            planned(model, monkeypatch, keep_best=figure, **both)
    with pytest.raises(ValueError, match="evaluated at the start and the end only: set eval_every"):
        planned(model, monkeypatch, keep_best="hard/avg@4", **both)
    planned(model, monkeypatch, keep_best="easy/avg@4", learners=0, **both)  # `unison evaluate --eval-samples 2`


def test_a_mean_of_several_sets_can_choose_the_best_model(model, monkeypatch):
    both = {"eval_every": 4, "eval_samples": 2, "means": {"all": {"easy/avg@2": 1, "hard/maj@4": 2.5}}}
    assert planned(model, monkeypatch, hard_every=6, keep_best="all/mean", **both).means["all"]["hard/maj@4"] == 2.5
    with pytest.raises(ValueError, match="'all/mean' chooses among evaluations, and its set is evaluated at the start"):
        planned(model, monkeypatch, keep_best="all/mean", **both)
    with pytest.raises(ValueError, match=r"keep_best='all' is no figure of a held-out set: .*hard/maj@4, all/mean"):
        planned(model, monkeypatch, keep_best="all", **both)
    wrong = both | {"means": {"all": {"easy/avg@4": 1.0}}}
    with pytest.raises(
        ValueError, match=r"data.means\['all'\]: 'easy/avg@4' is no figure of a held-out set: easy/avg@2"
    ):
        planned(model, monkeypatch, **wrong)
    planned(model, monkeypatch, learners=0, **wrong)  # `unison evaluate --eval-samples 2`


@pytest.mark.parametrize(
    ("means", "says"),
    [
        ({"all": {}}, r"means\['all'\]=\{\} must have weights above 0"),
        ({"all": {"easy/avg@1": 0.0}}, "must have weights above 0"),
        ({"all": {"easy/avg@1": float("nan")}}, "must be weights of figures: write means="),
        ({"easy": {"easy/avg@1": 1}}, r"means\['easy'\] has the name of a held-out set"),
    ],
)
def test_a_mean_without_weights_or_with_the_name_of_a_set_is_refused(means, says):
    with pytest.raises(ValueError, match=says):
        Data(train=[ONE], evals={"easy": [ONE]}, means=means)


def test_a_set_has_limits_of_its_own_and_else_those_of_the_run(model):
    evals = {"long": Eval(examples=[ONE], limits={"turns": 16}), "plain": [ONE]}
    evals["other"] = Eval(examples=[ONE], env=Calculator, limits={"tokens": 5, "seconds": 3})
    given = config(model, evals, env=Calculator, limits=Limits(turns=4, tool_s=7.0))
    prepared = prepare(given)
    player = episodes_of(given, None, prepared)
    sets = held_out_sets(given, None, prepared, player)
    assert sets["plain"].player is player
    assert sets["long"].player.stage.limits == Limits(turns=16, tool_s=7.0)
    assert sets["long"].player.stage.host is player.stage.host, "no second pool of threads or processes"
    assert sets["other"].player.stage.limits == Limits(turns=4, tokens=5, seconds=3.0, tool_s=7.0)


def test_prompts_show_the_tools_of_the_environment_that_plays_them(model):
    class Other(Calculator):
        def subtract(self, a: int, b: int) -> int:
            """Subtract."""
            return a - b

    evals = {
        "plain": [ONE],
        "own": Eval(examples=[ONE], env=Other),
        "replies": Eval(examples=[ONE], reward=lambda r: 0.0),
    }
    prepared = prepare(config(model, evals, env=Calculator))
    player = episodes_of(config(model, evals, env=Calculator), None, prepared)
    sets = held_out_sets(config(model, evals, env=Calculator), None, prepared, player)
    assert sets["plain"].player is player
    assert sets["replies"].player is None
    assert sets["replies"].reward is not None
    own = sets["own"].player
    assert isinstance(own, Episodes)
    names = [tool["function"]["name"] for tool in own.stage.chat.tools]
    assert (names, own.stage.host.env) == (["multiply", "add", "subtract"], Other)
    assert [tool["function"]["name"] for tool in player.stage.chat.tools] == ["multiply", "add"]


def test_other_code_of_a_set_is_noticed_when_a_run_resumes():
    def digests(**settings):
        return code_digests(config(), {"hard": Eval(examples=[ONE], **settings)})

    before, after = digests(reward=lambda reply: 1.0), digests(reward=lambda reply: 0.5)
    (name,) = before.keys() - code_digests(config()).keys()
    assert name.startswith("evals['hard'].reward ")
    assert before[name] != after[name]
