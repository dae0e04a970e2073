"""What does a run learn from? The examples, and the forms in which a data set can be given."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rl.typed import Checked, fit_field, show

Given = str | list[dict[str, Any]] | list[int]
"""A prompt as the data set has it: plain text, chat messages, or token ids."""


@dataclass(frozen=True, kw_only=True)
class Example(Checked):
    """One problem of a data set: the prompt, and what the reward needs to score a reply.

    A prompt is plain text, a list of chat messages, or a list of token ids, which reach the engine as they are. Raises
    ValueError for anything else.
    """

    prompt: Given
    task: Mapping[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Schemas of tools that this prompt shows, in the form of OpenAI's interface, besides those of the run. Calls of
    them go to the environment's `call(name, arguments)`."""

    def __post_init__(self) -> None:
        for i, message in enumerate(self.prompt):
            if isinstance(message, dict) and "role" not in message:
                raise ValueError(
                    f"prompt[{i}] has no 'role', only {', '.join(map(show, message)) or 'nothing'}: write chat "
                    "messages as {'role': 'user', 'content': 'What is 2 + 3?'}"
                )

    def located(self, path: str) -> tuple[str, str]:
        """Which example an error is about."""
        if path.startswith("prompt"):
            return path, " (in Example)"
        return path, f" (in the Example with prompt={show(self.prompt)})"

    @classmethod
    def right_form(cls, field: str, value: Any) -> str | None:
        """How to write a prompt, or a task."""
        if field == "task":
            return "must be a dict of what the reward needs: write task={'answer': '5'}"
        if field == "tools":
            return "must be a list of schemas: write tools=[{'type': 'function', 'function': {'name': 'add', ...}}]"
        if isinstance(value, Mapping):
            return "is one message: write a list of messages, prompt=[{'role': 'user', 'content': 'What is 2 + 3?'}]"
        if hasattr(value, "tolist"):
            return "is an array: write a list of token ids, prompt=ids.tolist()"
        return "must be text, a list of chat messages, or a list of token ids"


class Rows(Sequence[Example]):
    """The rows of a table, such as a Hugging Face data set, each made an example when it is needed.

    `Data(train=Rows(rows, lambda row: Example(prompt=row["question"], task={"answer": row["answer"]})))`
    """

    def __init__(self, rows: Any, example: Callable[[Any], Example]) -> None:
        self.rows, self.example = rows, example

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.example(self.rows[index])

    def __repr__(self) -> str:
        return f"Rows({len(self)})"


Train = (
    list[Example] | Sequence[Example] | Iterable[Example] | Callable[[], Iterable[Example]] | Callable[[int], Example]
)
"""A training set: a list, which is read and checked before the start. Or, read as the run needs it: any other sequence,
such as `Rows`; an iterable, or a function without arguments that returns one, such as a generator function; a function
of the position, which counts 0, 1, 2 and so on."""


def sized(train: Any) -> bool:
    """Whether a training set has a length and can be read in any order."""
    return hasattr(train, "__len__") and hasattr(train, "__getitem__")


@dataclass(frozen=True, kw_only=True)
class Eval(Checked):
    """A held-out set with settings of its own. Each that is None is the run's.

    `Data(train=..., evals={"hard": Eval(examples=hard, samples=16, every=50), "easy": easy})`
    """

    examples: Iterable[Example]
    samples: int | None = None
    """Completions per problem. Default: `Config.eval_samples`."""
    temperature: float | None = None
    """Default: `Config.eval_temperature`."""
    every: int | None = None
    """Steps between its evaluations. Default: `Config.eval_every`. 0: only before the first step and after the last."""
    reward: Callable[..., Any] | None = None
    """Scores single replies. Default: `Config.eval_reward`."""
    env: type | Callable[..., Any] | None = None
    """Environment class of its episodes. Default: `Config.env`, unless the set has a reward."""
    limits: Mapping[str, int | float | None] = field(default_factory=dict)
    """Limits of its episodes that differ from `Config.limits`, such as {"turns": 16}."""
    answer: Callable[..., Any] | None = None
    """Function that takes a `Reply` and returns its answer, None where it has none. Majority votes count equal answers
    (maj@n); no default."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "examples", fit_field(self, "examples", list(self.examples), list[Example]))
        for name, least in (("samples", 1), ("temperature", 0), ("every", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value:g} must be at least {least} (in Eval)")
        if self.env is not None and (self.reward is not None or self.answer is not None):
            other = "answer reads" if self.reward is None else "reward scores"
            raise ValueError(
                f"Eval: {other} single replies, and env={show(self.env)} plays and scores episodes: give one of them"
            )

    @classmethod
    def right_form(cls, field: str, value: Any) -> str | None:
        """How to write the examples."""
        form = "must be a list of Example: write Eval(examples=[Example(prompt='2 + 3 =')])"
        return form if field == "examples" else None


@dataclass(frozen=True, kw_only=True)
class Data(Checked):
    """What a run learns from, and the held-out sets that measure it.

    `Config.data` is a function that returns this, or a value of this: calling it gives itself. A list of training
    examples is read and checked before the start, and mixed anew in every epoch. Everything else is read as the run
    needs it: `Rows` and other sequences are mixed as a list is; an iterable, a function without arguments that returns
    one, and a function of the position (0, 1, 2, ...) are used in their own order.
    """

    train: Train
    evals: Mapping[str, Eval | Iterable[Example]] = field(default_factory=dict)
    means: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Weighted means of figures of several sets: {"all": {"easy/avg@4": 1, "hard/avg@4": 2}} is logged as
    eval/all/mean, and can be `Config.keep_best` as all/mean. An evaluation without one of the figures has no mean."""

    def __post_init__(self) -> None:
        for name, weights in self.means.items():
            if not weights or not all(0 < weight < float("inf") for weight in weights.values()):
                raise ValueError(f"data.means[{name!r}]={show(dict(weights))} must have weights above 0")
            if name in self.evals:
                raise ValueError(f"data.means[{name!r}] has the name of a held-out set: choose another")
        if isinstance(self.train, list | tuple | str | Mapping) or hasattr(self.train, "column_names"):
            object.__setattr__(self, "train", fit_field(self, "train", self.train, list[Example]))
        plain = {
            name: list(each) if isinstance(each, Iterable) and not isinstance(each, str | Mapping) else each
            for name, each in self.evals.items()
            if not hasattr(each, "column_names")
        }
        sets = fit_field(self, "evals", {**self.evals, **plain}, Mapping[str, Eval | list[Example]])
        object.__setattr__(self, "evals", sets)

    @property
    def sets(self) -> dict[str, Eval]:
        """The held-out sets, a plain list as one without settings of its own."""
        return {name: each if isinstance(each, Eval) else Eval(examples=each) for name, each in self.evals.items()}

    def __call__(self) -> "Data":
        return self

    def __repr__(self) -> str:
        evals = "".join(f", {name!r}: {len(list(each.examples))}" for name, each in self.sets.items())
        size = f"{len(self.train)} examples" if sized(self.train) else "read as needed"  # pyright: ignore
        return f"Data(train: {size}{evals})"

    def located(self, path: str) -> tuple[str, str]:
        """The same name as in all other messages about data."""
        return f"data.{path}", ""

    @classmethod
    def right_form(cls, field: str, value: Any) -> str | None:
        """How to write a list of examples."""
        columns = list(value) if isinstance(value, Mapping) else getattr(value, "column_names", None)
        if columns:
            # A row of a table, or a Hugging Face data set.
            return (
                f"has the columns {', '.join(map(str, columns))}: make an Example of each row, as in "
                "[Example(prompt=row['question'], task={'answer': row['answer']}) for row in rows]"
            )
        if field == "train":
            return "must be a list of Example: write train=[Example(prompt='2 + 3 =', task={'answer': '5'})]"
        if field == "means":
            return "must be weights of figures: write means={'all': {'easy/avg@4': 1, 'hard/avg@4': 2}}"
        return "must be a dict of lists of Example: write evals={'held_out': [Example(prompt='2 + 3 =')]}"
