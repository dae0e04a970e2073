"""Is an environment fit for training: equal starts, no global state, and no errors of its own?"""

import copy
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch

from rl.environments.threads import ASYNC
from rl.environments.types import EnvError
from rl.judges.loops import awaited_on
from rl.tools.methods import tools_of
from rl.typed import shortened, show
from trainer.doctor.finding import Finding

Environment = Callable[[Mapping[str, Any]], Any]
SEEDED = 3
"""Prompts, episodes and turns whose seeds are compared."""
MOST_TEXT = 300


def environment_findings(
    environment: Environment,
    tasks: Sequence[Mapping[str, Any]],
    *,
    seed_of: Callable[[int, int, int], int] | None = None,
    episodes: Callable[[], object] | None = None,
) -> list[Finding]:
    """What is wrong with an environment, with the tasks of some examples.

    `seed_of(ordinal, episode, turn)` is the seed of a turn. `episodes` plays some episodes against random replies, and
    raises EnvError. Blocks until `async` methods have their answer: call it in a thread where an event loop runs.
    """
    found: list[Finding] = []

    def add(cause: str, evidence: str, severity: Literal["fault", "warning"] = "fault") -> None:
        name = getattr(environment, "__name__", type(environment).__name__)
        found.append(Finding(cause=cause, severity=severity, where=name, evidence=evidence))

    try:
        tools_of(environment)
    except ValueError as error:
        add("tool_types", str(error))
        return found
    changed: list[str] = []
    try:
        with _watched(changed):
            for task in tasks:
                before = copy.deepcopy(dict(task))
                starts = [_started(environment(task)) for _ in range(2)]
                if starts[0] != starts[1]:
                    add("start_differs", f"from one task came {show(starts[0])} and {show(starts[1])}")
                    break
                # Text, because the values of a task may be arrays, which have no single equality.
                if repr(before) != repr(dict(task)):
                    add("task_changed", f"the task {show(before)} became {show(dict(task))}")
                    break
            if episodes and not found:
                episodes()
    except EnvError as error:
        add("environment_fails", shortened(str(error), MOST_TEXT))
    except Exception as error:  # the environment is the user's code
        add("environment_fails", shortened(f"{type(error).__name__}: {error}", MOST_TEXT))
    if changed:
        add("global_random", f"it changes the state of {' and '.join(changed)}")
    if seed_of:
        places = [(o, e, t) for o in range(SEEDED) for e in range(SEEDED) for t in range(SEEDED)]
        seeds = [seed_of(*place) for place in places]
        if len(set(seeds)) < len(seeds):
            first = next(i for i, seed in enumerate(seeds) if seed in seeds[:i])
            add("turn_seeds", f"(prompt, episode, turn) {places[first]} and {places[seeds.index(seeds[first])]} have "
                f"the seed {seeds[first]}")  # fmt: skip
    return found


def _started(environment: Any) -> Any:
    """What `start` returns, if there is one; the environment is closed afterwards."""
    try:
        return _awaited(environment.start()) if hasattr(environment, "start") else None
    finally:
        if hasattr(environment, "close"):
            _awaited(environment.close())


def _awaited(result: Any) -> Any:
    # On the loop of all async methods, because a connection of `start` may be closed in `close`.
    return awaited_on(ASYNC, result).result() if inspect.isawaitable(result) else result


def _states() -> dict[str, Any]:
    _, key, position, *rest = np.random.get_state()
    torch_state = torch.random.get_rng_state().numpy().tobytes()
    return {"random": random.getstate(), "numpy": (bytes(key), position, rest), "torch": torch_state}


@contextmanager
def _watched(changed: list[str]) -> Iterator[None]:
    """Collect which global generators changed."""
    before = _states()
    try:
        yield
    finally:
        changed += [name for name, state in _states().items() if state != before[name]]
