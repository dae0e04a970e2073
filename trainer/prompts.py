"""Text to tokens and back: chat template, prompt length, and the tokenizer's own files for the export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rl.config import Config
from rl.rewards.score import score
from rl.tokens import encode
from rl.types import Data, Example, Prompt, Reply
from trainer.plan.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, from a folder or the hub."""
    # Imported late: this takes seconds, in which the actors can start already.
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def encode_all(tokenizer: PreTrainedTokenizerBase, examples: list[Example], config: Config, where: str) -> list[Prompt]:
    """Prompts of a set. Raises ValueError that names the first prompt which leaves no room for a completion."""
    r = config.rollout
    prompts = []
    for index, example in enumerate(examples):
        ids = encode(tokenizer, example.prompt, config.chat_template_kwargs)
        if len(ids) + r.max_tokens > r.max_model_len:
            raise ValueError(
                f"{where}[{index}] has {len(ids)} prompt tokens, and with rollout.max_tokens={r.max_tokens} it does "
                f"not fit rollout.max_model_len={r.max_model_len}: drop it, or raise max_model_len to "
                f"{len(ids) + r.max_tokens}. It begins {str(example.prompt)[:80]!r}"
            )
        if not ids:
            raise ValueError(f"{where}[{index}] is an empty prompt")
        prompts.append(Prompt(ordinal=index, token_ids=ids, task=example.task))
    return prompts


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The data of a run as tokens."""

    tokenizer: PreTrainedTokenizerBase
    first_prompt: str | list[dict[str, str]]
    """The first training prompt before it became tokens."""
    train: list[Prompt]
    evals: Mapping[str, list[Prompt]]

    def decode(self, ids: list[int]) -> str:
        """Text as a reward sees it, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def read(plan: Plan) -> Prepared:
    """Check that the model runs and fits as planned, then load the data. Takes seconds. Raises as both do."""
    plan.check_model()
    return prepare(plan.config)


def prepare(config: Config) -> Prepared:
    """Load and tokenise the data, and try the reward on it. Raises ValueError, RewardError, or what the data raises."""
    data: Data = config.data()
    if not data.train:
        raise ValueError("the training data is empty: `Config.data()` returned no `train` examples")
    for name, examples in data.evals.items():
        if not examples:
            raise ValueError(f"the evaluation set {name!r} is empty: fill it, or leave it out of `Data.evals`")
    tokenizer = load_tokenizer(config.model)
    train = encode_all(tokenizer, data.train, config, "data.train")
    evals = {
        name: encode_all(tokenizer, examples, config, f"data.evals[{name!r}]") for name, examples in data.evals.items()
    }
    # An empty reply is the one every reward must be able to judge; it finds wrong signatures before anything starts.
    for reward in (config.reward, config.eval_reward or config.reward):
        score(reward, Reply(text="", finished=False, task=train[0].task, token_ids=[]), 0)
    return Prepared(tokenizer=tokenizer, first_prompt=data.train[0].prompt, train=train, evals=evals)
