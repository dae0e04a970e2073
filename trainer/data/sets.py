"""What of a run holds for a held-out set that has settings of its own, and can its best model be chosen by one?"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rl.config import Config
from rl.data import Eval
from rl.environments.check import check_environment, class_of
from rl.loop.evaluate import held_out
from rl.tokens import Rendering
from rl.tools import MCP
from rl.tools.mcp import server_of
from rl.tools.methods import schemas


def config_of(config: Config, name: str, given: Eval) -> Config:
    """The run's config, with the reward or the environment that a held-out set has of its own. Raises ValueError."""
    if given.env is not None:
        check_environment(class_of(given.env))
        return replace(config, env=given.env, reward=None, eval_reward=None)
    if given.reward is not None:
        return replace(config, reward=given.reward, env=None, eval_reward=None, env_workers=0, tools=MCP())
    if given.answer is not None and config.env is not None:
        raise ValueError(
            f"data.evals[{name!r}]: answer reads single replies, and the run plays episodes: give the set a reward of "
            "its own, or remove answer"
        )
    return config


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


def check_best(config: Config, given: Mapping[str, Eval]) -> None:
    """Raise ValueError where `keep_best` names no figure, or one that is measured at the start and the end only."""
    if not config.keep_best:
        return
    sets = {name: held_out(config, each, []) for name, each in given.items()}
    known = {f"{name}/{figure}": each for name, each in sets.items() for figure in each.figures}
    if config.keep_best not in known:
        raise ValueError(
            f"keep_best={config.keep_best!r} is no figure of a held-out set: {', '.join(known) or 'the data has none'}"
        )
    if not known[config.keep_best].every:
        raise ValueError(
            f"keep_best={config.keep_best!r} chooses among evaluations, and its set is evaluated at the start and the "
            "end only: set eval_every, or `every` of the set"
        )
