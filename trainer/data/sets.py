"""What of a run holds for a held-out set that has settings of its own, and can its best model be chosen by one?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from rl.config import Config
from rl.data import Eval
from rl.environments.check import check_environment, class_of
from rl.environments.types import Limits
from rl.loop.estimates import Means
from rl.loop.evaluate import held_out
from rl.tokens import Rendering
from rl.tools import MCP
from rl.tools.mcp import server_of
from rl.tools.methods import schemas


def config_of(config: Config, name: str, given: Eval) -> Config:
    """The run's config, with the reward or the environment that a held-out set has of its own. Raises ValueError."""
    if given.limits and (given.reward is not None or (given.env is None and not config.episodic)):
        raise ValueError(
            f"data.evals[{name!r}]: limits are for episodes, and the set has single replies: give it an env, or remove "
            "limits"
        )
    if given.limits:
        config = replace(config, limits=limits_of(config.limits, name, given.limits))
    if given.env is not None:
        check_environment(class_of(given.env))
        return replace(config, env=given.env, agent=None, reward=None, eval_reward=None)
    if given.reward is not None:
        return replace(config, reward=given.reward, env=None, agent=None, eval_reward=None, env_workers=0, tools=MCP())
    if given.answer is not None and config.episodic:
        raise ValueError(
            f"data.evals[{name!r}]: answer reads single replies, and the run plays episodes: give the set a reward of "
            "its own, or remove answer"
        )
    return config


def limits_of(limits: Limits, name: str, own: Mapping[str, Any]) -> Limits:
    """The run's limits with those that a held-out set has of its own. Raises ValueError."""
    known = [each.name for each in fields(Limits)]
    if unknown := [each for each in own if each not in known]:
        raise ValueError(f"data.evals[{name!r}]: limits has no {unknown[0]!r}, only {', '.join(known)}")
    try:
        return replace(limits, **own)
    except ValueError as error:
        raise ValueError(f"data.evals[{name!r}]: {error}") from None


def with_tools(rendering: Rendering, config: Config, more: Sequence[Mapping[str, Any]] = ()) -> Rendering:
    """The rendering of prompts that show the tools of a run: of its environment, of its MCP server, which is started
    to be asked, and `more`. Raises ValueError, and EnvError for a server that cannot be started."""
    if config.env is None:
        return rendering
    own = schemas(class_of(config.env))
    served = server_of(config.tools).schemas(config.deadlines.start_s) if config.tools else []
    names = [schema["function"]["name"] for schema in (*own, *served)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"the environment and its MCP server both have a tool {twice[0]!r}: rename the method")
    return replace(rendering, tools=[*own, *served, *more])


def check_figures(config: Config, given: Mapping[str, Eval], means: Means) -> None:
    """Raise ValueError where a mean or `keep_best` names no figure, or `keep_best` names one that is measured at the
    start and the end only."""
    sets = {name: held_out(config, each, []) for name, each in given.items()}
    every = {f"{name}/{figure}": each.every for name, each in sets.items() for figure in each.figures}
    known = ", ".join(every) or "the data has none"
    for name, weights in means.items():
        for figure in weights.keys() - every.keys():
            raise ValueError(f"data.means[{name!r}]: {figure!r} is no figure of a held-out set: {known}")
    # Those of a mean are measured together at their least common multiple.
    every |= {f"{n}/mean": math.lcm(*(every[figure] for figure in weights)) for n, weights in means.items()}
    if not config.keep_best:
        return
    if config.keep_best not in every:
        known = ", ".join(every) or "the data has none"
        raise ValueError(f"keep_best={config.keep_best!r} is no figure of a held-out set: {known}")
    if not every[config.keep_best]:
        raise ValueError(
            f"keep_best={config.keep_best!r} chooses among evaluations, and its set is evaluated at the start and the "
            "end only: set eval_every, or `every` of the set"
        )
