"""A value of the wrong kind is refused when it is made, with the line to write instead; what can be taken is taken."""

import re
from dataclasses import dataclass, replace

import pytest
from datasets import Dataset

from rl.config import Config, RolloutConfig, TrainerConfig
from rl.filters import ZeroAdvantage
from rl.objectives import GRPO, GSPO
from rl.objectives.corrections import TokenTIS, Uncorrected
from rl.rewards.shaping import SoftOverlong
from rl.types import Data, Example
from rl.validate import check, own_rule
from trainer.cluster.process_env import without_functions
from trainer.prompts import load_data
from trainer.runs.settings import resolved

# The suite checks arguments with beartype, which would answer before the product does.
pytestmark = pytest.mark.usefixtures("unchecked_types")


ONE = Example(prompt="2 + 3 =", task={"answer": "5"})


def config_of(**settings):
    return Config(**({"name": "t", "model": "m", "data": lambda: Data(train=[]), "reward": lambda r: 0.0} | settings))


def refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": GSPO}, "objective=GSPO is a class: write objective=GSPO()"),
        ({"objective": "gspo"}, "write objective=GSPO(), with `from rl.objectives import GSPO`"),
        ({"objective": "dr-grpo"}, "write objective=DrGRPO()"),
        ({"objective": "best"}, "objective='best' must be an objective: write objective=GSPO()"),
        ({"correction": "token_tis"}, "write correction=TokenTIS(), with `from rl.objectives.corrections import"),
        ({"dtype": "fp32"}, "dtype='fp32' is not one of 'bfloat16', 'float32'"),
        ({"steps": True}, "steps=True must be an integer, such as 100"),
        ({"steps": 1.5}, "steps=1.5 must be an integer"),
        ({"fp32_head": 1}, "fp32_head=1 must be True or False"),
        ({"temperature": float("nan")}, "temperature=nan must be a number, such as 1.0"),
        ({"model": None}, "model=None must be text"),
        ({"rollout": {"engines": 2}}, "write rollout=RolloutConfig(engines=2)"),
        ({"rollout": RolloutConfig}, "write rollout=RolloutConfig()"),
        ({"data": [ONE]}, "must be a function that returns Data(train=[Example(...)]), or such a Data"),
        ({"data": Data}, "data=Data is a class: write data=Data(...)"),
        ({"reward": 1.0}, "reward=1.0 must be a function that takes a Reply and returns a float"),
        ({"reward": SoftOverlong}, "reward=SoftOverlong is a class: write reward=SoftOverlong(...)"),
        ({"filters": ZeroAdvantage()}, "filters=ZeroAdvantage() is one filter: write a tuple"),
        ({"chat_template_kwargs": {"tools": [1]}}, "chat_template_kwargs['tools']=[1] must be"),
    ],
)
def test_a_setting_of_the_wrong_kind_shows_the_right_form(settings, message):
    refused(lambda: config_of(**settings), message)
    refused(lambda: replace(config_of(), **settings), message)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainerConfig(lr="1e-5"), "lr='1e-5' must be a number, such as 1e-06 (in TrainerConfig)"),
        (lambda: TrainerConfig(zero_stage=True), "zero_stage=True is not one of 0, 1, 2, 3"),
        (lambda: TrainerConfig(betas=(0.9,)), "betas=(0.9,) must have 2 values"),
        (lambda: GSPO(clip_low="x"), "clip_low='x' must be a number, such as 0.0003 (in GSPO)"),
        (lambda: GRPO(kl_estimator="k4"), "kl_estimator='k4' is not one of 'k1', 'k2', 'k3', 'k3+' (in GRPO)"),
        (lambda: TokenTIS(cap="2"), "cap='2' must be a number, such as 2.0 (in TokenTIS)"),
    ],
)
def test_every_part_of_a_config_is_checked(make, message):
    refused(make, message)


def test_what_converts_without_loss_is_converted():
    assert repr(config_of(temperature=1).temperature) == "1.0"
    assert TrainerConfig(betas=[1, 0.5]).betas == (1.0, 0.5)
    assert config_of(filters=[ZeroAdvantage()]).filters == (ZeroAdvantage(),)
    assert Data(train=(ONE,)).train == [ONE]


def test_a_users_objective_is_checked_before_its_own_post_init():
    @dataclass(frozen=True, kw_only=True)
    class Mine(GRPO):
        strength: float = 0.5

        def __post_init__(self) -> None:
            assert self.strength > 0

    assert repr(Mine(strength=2).strength) == "2.0"
    refused(lambda: Mine(strength="2"), "strength='2' must be a number, such as 0.5 (in Mine)")
    refused(lambda: Mine(clip_high=None), "clip_high=None must be a number, such as 0.2 (in Mine)")


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Data(train=[{"question": "2 + 3", "answer": 5}]),
            "train[0]={'question': '2 + 3', 'answer': 5} has the columns question, answer: make an Example of each row",
        ),
        (
            lambda: Data(train=Dataset.from_dict({"question": ["2 + 3"], "answer": ["5"]})),
            "has the columns question, answer: make an Example of each row, as in [Example(prompt=row['question'], ",
        ),
        (lambda: Data(train="data.json"), "train='data.json' must be a list of Example: write train=[Example("),
        (lambda: Data(train=[ONE], evals=[ONE]), "must be a dict of lists of Example: write evals={'held_out': ["),
        (lambda: Example(prompt={"role": "user", "content": "2 + 3"}), "is one message: write a list of messages"),
        (
            lambda: Example(prompt=[{"content": "2 + 3"}]),
            "prompt[0] has no 'role', only 'content': write chat",
        ),
        (lambda: Example(prompt=[5, "a"]), "prompt[1]='a' must be text, a list of chat messages, or a list of token"),
        (lambda: Example(prompt=[True]), "prompt[0]=True must be text"),
        (lambda: Example(prompt="2 + 3", task="5"), "task='5' must be a dict of what the reward needs"),
    ],
)
def test_data_of_the_wrong_kind_shows_the_right_form(make, message):
    refused(make, message)


def test_data_can_be_given_as_a_value():
    data = Data(train=[ONE], evals={"held_out": [ONE, ONE]})
    config = config_of(data=data)
    assert load_data(config) is data
    assert resolved(config)["data"] == "Data(train: 1 examples, 'held_out': 2)"


def test_a_function_that_returns_something_else_is_named():
    def products():
        return [ONE]

    with pytest.raises(ValueError, match=r"returns Data\(train=\[Example.*products returned a list: write return Data"):
        load_data(config_of(data=products))


def test_actors_get_the_config_without_the_code():
    config = config_of(data=Data(train=[ONE]), filters=(ZeroAdvantage(),), steps=7)
    travels = without_functions(config)
    assert (travels.steps, travels.filters) == (7, ())
    with pytest.raises(AssertionError, match="on the driver only"):
        travels.data()


# -- rules live with their owners --------------------------------------------------------------------------------------


def test_an_objective_filter_and_reward_of_the_users_own_state_their_rules():
    @dataclass(frozen=True, kw_only=True)
    class Mine(GRPO):
        def check(self, config: Config) -> None:
            if config.group_size < 16:
                raise ValueError("Mine needs group_size >= 16")

    class Own:
        def __call__(self, value):
            return None

        def check(self, config):
            raise ValueError(f"Own refuses {config.name}")

    refused(lambda: check(config_of(objective=Mine())), "Mine needs group_size >= 16")
    check(config_of(objective=Mine(), group_size=16))
    refused(lambda: check(config_of(objective=Mine(kl_coef=-1.0), group_size=16)), "kl_coef=-1 and")
    for part in ({"filters": (Own(),)}, {"reward": Own()}, {"eval_reward": Own()}):
        refused(lambda part=part: check(config_of(**part)), "Own refuses t")


def test_a_method_of_the_same_name_for_something_else_is_not_called():
    class MathReward:
        def __call__(self, reply):
            return 0.0

        def check(self, answer, gold):
            raise AssertionError("never called")

    assert own_rule(MathReward()) is None
    check(config_of(reward=MathReward()))
    assert own_rule(Uncorrected()) is not None
