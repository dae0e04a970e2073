"""Text to tokens and back: chat template, prompt length, and the tokenizer's own files for the export."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rl.config import Config
from rl.rewards.combined import judges_groups
from rl.rewards.score import score_in_time
from rl.tokens import encode
from rl.typed import show
from rl.types import Data, Example, Given, Prompt, Reply
from trainer.model.files import listed_stop_ids
from trainer.model.forbidden import forbidden
from trainer.plan.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, from a folder or the hub."""
    # Imported late: this takes seconds, in which the actors can start already.
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def encode_all(tokenizer: PreTrainedTokenizerBase, examples: list[Example], config: Config, where: str) -> list[Prompt]:
    """Prompts of a set. Raises ValueError that names the first prompt that is wrong or leaves no room to answer."""
    from jinja2 import TemplateError

    r = config.rollout
    prompts = []
    for index, example in enumerate(examples):
        begins = f"It begins {str(example.prompt)[:80]!r}"
        try:
            ids = encode(tokenizer, example.prompt, config.chat_template_kwargs)
        except (TemplateError, ValueError) as error:
            raise ValueError(f"{where}[{index}] cannot be encoded: {error}. {begins}") from error
        if len(ids) + r.max_tokens > r.max_model_len:
            raise ValueError(
                f"{where}[{index}] has {len(ids)} prompt tokens, and with rollout.max_tokens={r.max_tokens} it does "
                f"not fit rollout.max_model_len={r.max_model_len}: drop it, or raise max_model_len to "
                f"{len(ids) + r.max_tokens}. {begins}"
            )
        if not ids:
            raise ValueError(f"{where}[{index}] is an empty prompt")
        prompts.append(Prompt(ordinal=index, token_ids=ids, task=example.task, given=example.prompt))
    return prompts


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The data of a run as tokens."""

    tokenizer: PreTrainedTokenizerBase
    first_prompt: Given
    """The first training prompt before it became tokens."""
    train: list[Prompt]
    evals: Mapping[str, list[Prompt]]
    stop_ids: list[int]
    """Every token id that ends a reply."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text as a reward sees it."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))


def read(plan: Plan) -> Prepared:
    """Check that the model runs and fits as planned, then load the data. Takes seconds. Raises as both do."""
    plan.check_model()
    return prepare(plan.config)


def load_data(config: Config) -> Data:
    """Call the user's function. Raises ValueError when it returns something else than a filled `Data`."""
    data = config.data()
    if not isinstance(data, Data):
        kind = type(data).__name__
        raise ValueError(
            f"data must be a function that returns Data(train=[Example(...)]), and {show(config.data)} returned a "
            f"{kind}: write return Data(train=[Example(prompt='2 + 3 =', task={{'answer': '5'}})])"
        )
    if not data.train:
        raise ValueError("the training data is empty: `Config.data()` returned no `train` examples")
    for name, examples in data.evals.items():
        if not examples:
            raise ValueError(f"the evaluation set {name!r} is empty: fill it, or leave it out of `Data.evals`")
    return data


def prepare(config: Config) -> Prepared:
    """Load and tokenise the data, and try the reward on it. Raises ValueError, RewardError, or what the data raises.

    Call it in a thread when an event loop runs: it waits for the reward's answer.
    """
    data = load_data(config)
    tokenizer = load_tokenizer(config.model)
    forbidden(config, config.model, tokenizer)  # refuses what the actors would refuse after their start
    train = encode_all(tokenizer, data.train, config, "data.train")
    evals = {
        name: encode_all(tokenizer, examples, config, f"data.evals[{name!r}]") for name, examples in data.evals.items()
    }
    prepared = Prepared(
        tokenizer=tokenizer,
        first_prompt=data.train[0].prompt,
        train=train,
        evals=evals,
        stop_ids=sorted({*listed_stop_ids(config.model, tokenizer), *config.rollout.stop_token_ids}),
    )
    try_rewards(config, prepared)
    return prepared


def try_rewards(config: Config, prepared: Prepared) -> None:
    """Score an empty reply, which every reward must be able to do: it finds wrong signatures before anything starts."""
    first = prepared.train[0]
    empty = Reply(
        text="",
        finished=False,
        task=first.task,
        token_ids=[],
        prompt=first.given,
        prompt_token_ids=first.token_ids,
        decode=prepared.decode,
    )
    for reward in (config.reward, *([config.eval_reward] if config.eval_reward else [])):
        asked = [empty] * config.group_size if judges_groups(reward) else empty
        asyncio.run(score_in_time(reward, asked, 0, config.deadlines.reward_s))
