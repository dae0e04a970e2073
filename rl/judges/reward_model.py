"""A reward model as a judge: its settings, and the engine that the run has started for it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

from rl.data import Given
from rl.judges.agreement import Cases
from rl.judges.desk import Calls, asked
from rl.judges.hearing import JudgeError, current
from rl.typed import Checked
from rl.types import Verdict

Engine = Callable[[Given, str], Awaitable[float]]
"""Scores a reply to a prompt. Raises JudgeError."""
_ENGINES: WeakKeyDictionary[Any, Engine] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardModel(Checked):
    """A frozen model with one output, such as a `...ForSequenceClassification`, awaited in a reward: `await
    judge(prompt, reply)`. The run gives it an engine of its own: write it in `Config(judges=...)` too.

    It reads prompt and reply through its own chat template; without one, as the two texts of a pair. The score is the
    model's output as it is, without a sigmoid.
    """

    model: str
    """Local folder or hub name."""
    name: str = ""
    """Its name in metrics, files and errors. Default: the last part of `model`."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of its weights."""
    max_model_len: int = 2048
    """Most tokens of a prompt and a reply together. A longer one is an error."""
    max_num_seqs: int = 64
    """Most replies that it scores at the same time."""
    kv_cache_gib: float = 0.5
    """Cache of its engine on CPU, in GiB."""
    gpu_memory_utilization: float = 0.85
    """Share of its GPU's memory, from 0 to 1. It has a GPU of its own."""
    calls: Calls = Calls(concurrency=256)
    """Concurrency and deadlines."""
    labelled: Callable[[], Cases] | None = None
    """Cases with known labels; the run reports before its first step how far the judge agrees with them."""

    @property
    def label(self) -> str:
        """Its name in metrics and files."""
        return self.name or Path(self.model).name

    @property
    def shown(self) -> str:
        """Its name and model."""
        return f"{self.label!r} (reward model {self.model})"

    @property
    def repeatable(self) -> bool:
        """Its verdicts may be kept: it is frozen."""
        return True

    async def __call__(self, prompt: Given, reply: str) -> float:
        """The score of a reply to a prompt. Raises JudgeError. In the trial of a reward, before any engine has started,
        it is 0."""
        if current().rehearsal and self not in _ENGINES:
            return 0.0
        return await asked(self, prompt, reply)

    async def ask(self, prompt: Given, reply: str) -> Verdict:
        """One request to its engine."""
        if self not in _ENGINES:
            raise JudgeError(
                f"the judge {self.shown} has no engine here: write Config(judges=(judge,)), with this same object"
            )
        try:
            score = await _ENGINES[self](prompt, reply)
        except JudgeError as error:
            raise JudgeError(f"the judge {self.shown} {error}") from None
        return Verdict(judge=self.label, reply=reply, score=score, raw=repr(score))


def connect(judge: RewardModel, engine: Engine) -> None:
    """From now on the judge is asked through this engine."""
    _ENGINES[judge] = engine
