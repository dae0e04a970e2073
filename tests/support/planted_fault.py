"""What is a planted fault of the doctor's exam?"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from pair import Pair

Plant = Callable[[Pair], AbstractContextManager]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault, as it would come about in a run."""

    name: str
    side: Literal["sampler", "numbers", "prompts", "wire", "body", "trainer"]
    plant: Plant
    causes: frozenset[str]
    """The names that a doctor may give it first."""
    where: tuple[str, ...]
    """Beginnings of the places that may be named: engine, trainer, driver."""
    models: tuple[str, ...] = ("qwen2-untied",)
    setting: str = "plain"
    """One of `exam.SETTINGS`."""
    hurts_bf16: bool = True
    """Whether a run in bf16 learns something else because of it: its k3 in fp32 is above that of a clean run in bf16,
    or it changes more than numbers."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Runs in which it changes anything."""
    prepare: Plant | None = None
    """What must hold before and while it is planted, and is no fault: an update may have to bring other weights."""


FAULTS: dict[str, Fault] = {}


def add(side: str, name: str, causes: str, plant: Plant, where: str = "engine", **more: object) -> None:
    assert name not in FAULTS, name
    right: dict = {"causes": frozenset(causes.split()), "where": tuple(where.split()), "side": side, **more}
    FAULTS[name] = Fault(name=name, plant=plant, **right)
