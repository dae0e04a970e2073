"""What scores a reply with a model: reward models and judges behind a URL. A recipe imports from here."""

from rl.judges.agreement import Labelled, Preference, agreement
from rl.judges.chat import OpenAIJudge, number_after
from rl.judges.desk import Calls
from rl.judges.hearing import JudgeError
from rl.judges.reward_model import RewardModel

Judge = OpenAIJudge | RewardModel

__all__ = [
    "Calls",
    "Judge",
    "JudgeError",
    "Labelled",
    "OpenAIJudge",
    "Preference",
    "RewardModel",
    "agreement",
    "number_after",
]
