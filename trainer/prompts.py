"""Text to tokens and back: the data of a run, read and checked before anything starts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.config import Config
from rl.data import Data, Eval, Given, Train, sized
from rl.environments.host import ThreadHost
from rl.environments.play import Chat, play
from rl.environments.template import chat_of
from rl.judges.hearing import hear
from rl.loop.estimates import Means
from rl.loop.evaluate import answers_of
from rl.loop.players import stage_of
from rl.loop.progress import numbers, runs
from rl.loop.stream import stream
from rl.rewards.combined import judges_groups
from rl.rewards.score import score_in_time
from rl.tokens import Rendering
from rl.typed import show
from rl.types import Completion, Prompt, Reply
from trainer.data.encode import Encoder, peek
from trainer.data.fingerprint import fingerprint
from trainer.data.first_prompt import FirstPrompt, first_prompt
from trainer.data.sets import check_figures, config_of, with_tools
from trainer.machine import check_proxy
from trainer.model.files import listed_stop_ids, remote_code
from trainer.model.forbidden import forbidden
from trainer.plan.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PEEK = 8
"""Examples that are read and checked before the start, of a training set that is read as needed."""


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, from a folder or the hub."""
    # Imported late: this takes seconds, in which the actors can start already.
    from transformers import AutoTokenizer

    with remote_code(path, trust_remote_code) as more:
        return AutoTokenizer.from_pretrained(path, **more)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The data of a run as tokens."""

    tokenizer: PreTrainedTokenizerBase
    rendering: Rendering
    """Of the first training prompt, with its tools."""
    first_prompt: Given
    """The first training prompt before it became tokens."""
    train: list[Prompt]
    """All prompts of a list, and some of a training set that is read as needed."""
    evals: Mapping[str, list[Prompt]]
    stop_ids: list[int]
    """Every token id that ends a reply."""
    encoder: Encoder
    """Makes the training prompts, and knows those that are too long."""
    source: Train | None = None
    """The training set that is read as needed; None: `train` is all of it."""
    sets: Mapping[str, Eval] = field(default_factory=dict)
    """The settings of each held-out set."""
    means: Means = field(default_factory=dict)
    """Weights of figures by the name of their mean."""
    long_evals: Mapping[str, int] = field(default_factory=dict)
    """Prompts of each held-out set that were dropped or cut."""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    """By which a resumed run notices what changed."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text as a reward sees it."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def stream(self, seed: int, ended: Container[int] = ()) -> Iterator[Prompt]:
        """The training prompts of a run in which the ordinals `ended` need not be made again."""
        if self.source is None:
            return stream(self.train, seed)
        encoder = self.encoder
        return stream(self.source, seed, prompt=encoder.prompt, ended=ended, dropped=frozenset(encoder.dropped))

    def chat(self, config: Config) -> Chat:
        """The chat template, for the turns of a run's episodes or of a held-out set's."""
        return chat_of(self.tokenizer, with_tools(self.rendering, config), self.stop_ids)

    @cached_property
    def first(self) -> FirstPrompt:
        """The first training prompt, to be shown."""
        return first_prompt(self.tokenizer, self.first_prompt, self.train[0].token_ids, self.rendering)

    @property
    def long(self) -> int:
        """Training prompts that were dropped or cut so far."""
        return len(self.encoder.dropped) + len(self.encoder.cut)

    def metrics(self) -> dict[str, float]:
        """What is logged with every step."""
        return {} if self.encoder.config.long_prompts == "refuse" else {"data/long_prompts": float(self.long)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run reads the same prompts."""
        long = {name: runs(sorted(getattr(self.encoder, name))) for name in ("dropped", "cut")}
        return {"now": self.rendering.now.isoformat(), "long_prompts": long}

    def lines(self) -> list[Any]:
        """What to print at the start: long prompts by set, and the first prompt."""
        words = {"drop": "dropped", "cut": "cut at their beginning"}.get(self.encoder.config.long_prompts, "")
        size = len(self.train) + len(self.encoder.dropped)
        counts = [("data.train", self.long, size)] if self.source is None else []
        counts += [(f"data.evals[{n!r}]", long, None) for n, long in self.long_evals.items()]
        long = [f"{name}: {n}{f' of {of}' if of else ''} long prompts {words}" for name, n, of in counts if n]
        return [*long, *self.first.lines()]


def read(plan: Plan, saved: Mapping[str, Any] | None = None) -> Prepared:
    """Check that the model runs and fits as planned, then load the data. Takes seconds. Raises as both do."""
    plan.check_model()
    prepared = prepare(plan.config, saved)
    if plan.placement.learners:
        check_figures(plan.config, prepared.sets, prepared.means)
    return prepared


def load_data(config: Config) -> Data:
    """Call the user's function. Raises ValueError when it returns something else than a filled `Data`."""
    try:
        data = config.data()
    except FileNotFoundError as error:
        name = error.filename
        if not isinstance(name, str) or os.path.isabs(name):
            raise
        raise FileNotFoundError(
            f"{show(config.data)} reads {name!r}, and there is no such file in {Path.cwd()}: a relative path begins in "
            "the folder where the run is started. Start it there, or write Path(__file__).parent / ... in the recipe"
        ) from error
    if not isinstance(data, Data):
        kind = type(data).__name__
        raise ValueError(
            f"data must be a function that returns Data(train=[Example(...)]), and {show(config.data)} returned a "
            f"{kind}: write return Data(train=[Example(prompt='2 + 3 =', task={{'answer': '5'}})])"
        )
    if sized(data.train) and not data.train:
        raise ValueError("the training data is empty: `Config.data()` returned no `train` examples")
    for name, each in data.sets.items():
        if not each.examples:
            raise ValueError(f"the evaluation set {name!r} is empty: fill it, or leave it out of `Data.evals`")
    return data


def prepare(config: Config, saved: Mapping[str, Any] | None = None) -> Prepared:
    """Load and tokenise the data, and try the reward on it. Raises ValueError, RewardError, or what the data raises.

    `saved` is the `Prepared.state` of the run that is resumed. Call it in a thread when an event loop runs: it waits
    for the reward's answer.
    """
    data, before = load_data(config), saved or {}
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    forbidden(config, config.model, tokenizer)  # refuses what the actors would refuse after their start
    listed = listed_stop_ids(config.model, tokenizer, trust_remote_code=config.trust_remote_code)
    now = datetime.fromisoformat(before["now"]) if before else datetime.now()
    rendering = Rendering(template=config.chat_template_kwargs, now=now)

    def encoder(where: str, config: Config = config, **long: set[int]) -> Encoder:
        shown = with_tools(rendering, config)
        return Encoder(tokenizer=tokenizer, config=config, rendering=shown, where=where, **long)

    source = None
    if isinstance(data.train, list):
        train = (main := encoder("data.train")).all(data.train)
    else:
        train, source = peek(data.train, PEEK, encoder("data.train"))
        long = {name: set(numbers(before["long_prompts"][name])) for name in ("dropped", "cut")} if before else {}
        main = encoder("data.train", **long)
    configs = {name: config_of(config, name, each) for name, each in data.sets.items()}
    evals = {name: encoder(f"data.evals[{name!r}]", own) for name, own in configs.items()}
    asked = {name: evals[name].all(list(each.examples)) for name, each in data.sets.items()}
    prepared = Prepared(
        tokenizer=tokenizer,
        rendering=with_tools(rendering, config, train[0].tools),
        first_prompt=train[0].given,
        train=train,
        evals=asked,
        encoder=main,
        source=source,
        stop_ids=sorted({*listed, *config.rollout.stop_token_ids}),
        sets=data.sets,
        means=data.means,
        long_evals={name: len(each.dropped) + len(each.cut) for name, each in evals.items()},
        fingerprint=fingerprint(config, train, asked, source, data.sets, data.means),
    )
    try_scoring(config, prepared, train[0], "data.train[0]")
    for name, own in configs.items():
        if own is not config or data.sets[name].answer:
            try_scoring(own, prepared, asked[name][0], f"data.evals[{name!r}][0]", data.sets[name].answer)
    return prepared


def try_scoring(
    config: Config, prepared: Prepared, first: Prompt, where: str, answer: Callable[[Reply], Any] | None = None
) -> None:
    """Score the first prompt of a set, without an engine."""
    if not config.episodic:
        try_rewards(config, prepared, first, answer)
    elif config.env is not None:
        try_environment(config, prepared, first, where)
    else:
        check_proxy(config.rollout.endpoint_host)


def try_rewards(config: Config, prepared: Prepared, first: Prompt, answer: Callable[[Reply], Any] | None) -> None:
    """Score an empty reply, cut off and ended, which every reward must be able to do: it finds wrong signatures, and
    judges that do not answer, before anything starts."""
    empty = Reply(
        text="",
        finished=False,
        task=first.task,
        token_ids=[],
        prompt=first.given,
        prompt_token_ids=first.token_ids,
        decode=prepared.decode,
    )
    for reward, finished in product(filter(None, (config.reward, config.eval_reward)), (False, True)):
        reply = replace(empty, finished=finished)
        asked = [reply] * config.group_size if judges_groups(reward) else reply
        with hear(rehearsal=True):
            asyncio.run(score_in_time(reward, asked, 0, config.deadlines.reward_s))
    if answer is not None:
        answers_of(answer, [empty])


def try_environment(config: Config, prepared: Prepared, first: Prompt, where: str) -> None:
    """Play one episode of the first prompt in which the policy says nothing: it finds what a constructor, `start`,
    `reward` or `close` gets wrong. Raises ValueError, and EnvError for what the environment raises."""
    assert config.env is not None
    if isinstance(first.given, str) or not all(isinstance(m, dict) for m in first.given):
        raise ValueError(
            f"env needs prompts that are chat messages, and {where} is {show(first.given)}: write "
            "prompt=[{'role': 'user', 'content': '...'}]"
        )

    silent, chat = Silent(prepared.stop_ids[:1] or [0]), prepared.chat(config)
    stage = stage_of(config, silent, prepared.decode, chat, ThreadHost(env=config.env))
    with hear(rehearsal=True):
        asyncio.run(play(stage, first, 0, lambda turn: 0))


@dataclass
class Silent:
    """`Rollouts` of a policy that says nothing, and is cut off."""

    says: list[int]

    async def sample(self, token_ids: list[int], n: int, **_: Any) -> list[Completion]:
        """One token, without meaning."""
        return [Completion(token_ids=self.says, logprobs=[0.0], versions=[0], finish_reason="length")] * n
