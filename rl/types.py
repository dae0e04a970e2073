"""What travels between rollout, loop and trainer."""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rl.data import Data as Data
from rl.data import Eval as Eval
from rl.data import Example as Example
from rl.data import Given
from rl.data import Rows as Rows

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One position of the data stream. `ordinal` is never reused, so it also names the group."""

    ordinal: int
    token_ids: list[int]
    task: Mapping[str, Any]
    given: Given = ""
    """The prompt as the data set has it, for the reward."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Tools that this prompt shows besides those of the run."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A tool call of the policy."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""
    """The id that the policy or its parser gave it; empty where the protocol has none."""


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """What a parser found in one completion."""

    text: str
    """The answer alone, without reasoning and calls."""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    malformed: str = ""
    """Why a call that begins in the completion cannot be understood; empty if every call can."""


TYPECODES = {"token_ids": "i", "logprobs": "f", "versions": "i"}
"""What `array` calls the items of a column: int32, and float32 as engines return log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the engine sampled: `logprobs[i]` (nats) and `versions[i]` belong to `token_ids[i]`.

    `support[i]` are the vocabulary ids that truncation kept when token i was sampled, where the engine reports them.
    `experts` [prompt + tokens - 1, layers, k] are the experts that each token went through, where the engine reports
    them; the last token was sampled and went through none. In the engine that made them the columns are lists; in
    another process they are arrays, which equal no list.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    versions: Sequence[int]
    finish_reason: FinishReason
    cached_prompt_tokens: int = 0
    support: list[list[int]] | None = None
    experts: Tensor | None = field(default=None, repr=False, compare=False)
    parsed: Parsed | None = None
    """Set where the engine has a parser for tool calls or reasoning."""
    engine: int = 0
    """The engine that sampled it."""

    def __getstate__(self) -> dict[str, Any]:
        # To another process numbers travel as arrays, and stay arrays there: objects of Python would cost most of a
        # step on the driver.
        return self.__dict__ | {name: array(code, getattr(self, name)) for name, code in TYPECODES.items()}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a reward function sees: one decoded completion, its prompt, and the example's task."""

    text: str
    """The completion without special tokens."""
    finished: bool
    """Whether the policy ended the reply itself; False: `rollout.max_tokens` cut it off."""
    task: Mapping[str, Any]
    token_ids: list[int]
    """Tokens of the completion alone."""
    prompt: Given = ""
    """The prompt as the data set has it."""
    prompt_token_ids: list[int] = field(default_factory=list)
    decode: Callable[..., str] | None = field(default=None, repr=False, compare=False)
    """`decode(token_ids, skip_special_tokens=False)` gives text; used by `text_with_special_tokens`."""

    @cached_property
    def text_with_special_tokens(self) -> str:
        """The completion with every special token, such as `<|im_end|>`; decoded when first asked for."""
        return self.text if self.decode is None else self.decode(self.token_ids, skip_special_tokens=False)

    def __getstate__(self) -> dict[str, Any]:
        # The text travels to another process, the tokenizer does not.
        return self.__dict__ | {"text_with_special_tokens": self.text_with_special_tokens, "decode": None}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a judge (`rl.judges`) said about a reply."""

    judge: str
    """Its name."""
    reply: str
    """The text that it judged."""
    score: float
    raw: str
    """Its own words; of a reward model the score."""


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A scored sequence. All columns have the length of `token_ids`; entry i belongs to token i.

    Lists of numbers become arrays, 13 bytes a token, because a step may hold millions; an array equals no list.
    `mask[i]` is 1 where the policy sampled token i. Outside the mask `logprobs` (nats) is 0, `versions` is -1, and
    `support` (the ids kept by truncation, where the engine reports them) is empty. `experts` [tokens - 1, layers, k]
    are those of every token but the last, sampled or not.

    An episode is one trajectory, or several where its history was edited: its rows. Each holds what the policy was
    given, and trains the tokens that were sampled for it; a sampled token is in the mask of one row only. All rows of
    an episode have the episode's reward, its parts and its finish reason.
    """

    group: int
    episode: int = 0
    """Which of the group's episodes; they count from 0."""
    row: int = 0
    """Which of the episode's rows, in the order of time; they count from 0."""
    token_ids: Sequence[int]
    mask: Sequence[int]
    logprobs: Sequence[float]
    versions: Sequence[int]
    reward: float
    reward_parts: Mapping[str, float] = field(default_factory=dict[str, float])
    finish_reason: FinishReason = "stop"
    support: list[list[int]] | None = None
    experts: Tensor | None = field(default=None, repr=False, compare=False)
    trained: bool = True
    """Whether its tokens are trained on. False: its reward counts for the others of its group, and that is all."""
    turns: Sequence[int] | None = None
    """`turns[i]` is the turn of the episode in which token i was sampled, from 0 in the order of time; -1 outside the
    mask. None: all in turn 0."""
    paid: tuple[tuple[int, float], ...] | None = None
    """Where the reward was paid: (index of a sampled token, amount). Over all rows of an episode the amounts add up to
    `reward`. None: all of it at the last sampled token."""
    verdicts: tuple[Verdict, ...] = ()
    """What judges said about it."""
    engine: int = -1
    """The engine that sampled its last token; -1: not known."""

    def __post_init__(self) -> None:
        for name, code in (TYPECODES | {"mask": "b", "turns": "i"}).items():
            column = getattr(self, name)
            if column is not None and not isinstance(column, array):
                object.__setattr__(self, name, array(code, column))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The tensors of one optimizer step, right-padded; S = T + 1. An objective gets one row for each episode.

    Column t of every [B, T, ...] tensor belongs to the prediction of `input_ids[:, t + 1]`; nothing downstream shifts.
    `rollout_logprobs` is the behaviour policy, `old_logprobs` the proximal one, `ref_logprobs` the reference (nats).
    `token_rewards`, where set, is what each token is paid, and sums up to `rewards` over the rows of an episode; else
    all is paid at its end.
    `support` holds the vocabulary ids that a token was sampled from, padded with -1; None: the engine reports none.
    `experts` holds the K experts of each layer that the engine sent `input_ids[:, t]` to, -1 outside the row; None: the
    same.
    """

    input_ids: Int[Tensor, "B S"]
    mask: Bool[Tensor, "B T"]
    rollout_logprobs: Float[Tensor, "B T"]
    versions: Int[Tensor, "B T"]
    rewards: Float[Tensor, " B"]
    group_ids: Int[Tensor, " B"]
    old_logprobs: Float[Tensor, "B T"] | None = None
    ref_logprobs: Float[Tensor, "B T"] | None = None
    values: Float[Tensor, "B T"] | None = None
    token_rewards: Float[Tensor, "B T"] | None = None
    support: Int[Tensor, "B T K"] | None = None
    experts: Int[Tensor, "B T L E"] | None = None
    episode_ids: Int[Tensor, " B"] | None = None
    """Rows of one episode have one id, which no other episode of the step has. None: every row is an episode."""
    turns: Int[Tensor, "B T"] | None = None
    """The turn of its episode in which each token was sampled, from 0; -1 outside the mask. None: one turn each."""
    states: Int[Tensor, "B T"] | None = None
    """The state in which each token's turn began, as a number that equal states share (`rl.episodes.rows.states_of`);
    -1 outside the mask. None: one turn each, so all of a group began in the state of its prompt."""

    def __getstate__(self) -> dict[str, Any]:
        # Pickle takes numpy's arrays as they are; a tensor it would copy three times, and once more its whole storage.
        return {name: x.detach().contiguous().numpy() for name, x in columns(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copied, because nobody may write to what Ray shares between processes.
        self.__dict__.update({name: torch.tensor(x) for name, x in state.items()})

    def to_device(self, device: torch.device) -> "Batch":
        """The same batch with every tensor on `device`."""
        return replace(self, **{name: x.to(device) for name, x in columns(self).items()})


@dataclass(frozen=True, kw_only=True)
class Step(Batch):
    """A batch, or a part of one, as `Objective.loss` gets it: `old_logprobs` is always set."""

    # field(): a bare annotation would inherit the default None.
    old_logprobs: Float[Tensor, "B T"] = field()


def columns(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by name, without those that are None."""
    return {f.name: x for f in fields(batch) if (x := getattr(batch, f.name)) is not None}


def step_of(batch: Batch, old_logprobs: Float[Tensor, "B T"] | None = None) -> Step:
    """The batch as a step, with these old log-probabilities or with its own. Raises ValueError without any."""
    old = needed(batch.old_logprobs if old_logprobs is None else old_logprobs, "old_logprobs")
    return Step(**columns(batch) | {"old_logprobs": old})


DECLARED_BY = {"old_logprobs": "uses_old_logprobs", "ref_logprobs": "uses_reference", "values": "uses_values"}
"""Columns that are None unless an objective declares that it reads them, with the class variable that declares it."""


def needed(column: Tensor | None, name: Literal["old_logprobs", "ref_logprobs", "values"]) -> Tensor:
    """A column that only some batches have, as in `needed(batch.values, "values")`. Raises ValueError if it is None."""
    if column is None:
        raise ValueError(f"there are no {name}: declare `{DECLARED_BY[name]}: ClassVar[bool] = True` in the objective")
    return column


@dataclass(frozen=True, kw_only=True)
class PolicyOutput:
    """The current policy's numbers for every column (nats)."""

    logprobs: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"] | None = None


Metrics = dict[str, torch.Tensor]
TokenLoss = tuple[Float[Tensor, "B T"], Metrics]
"""What a loss returns: the loss of every token, and metrics by name."""
