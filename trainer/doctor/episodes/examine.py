"""Which findings about episodes does a run have before its engines are asked?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

from rl.environments.template import chat_of
from rl.tokens import Rendering
from rl.tools.methods import tools_of
from trainer.doctor.episodes.calls import Parse, parser_findings
from trainer.doctor.episodes.chat import template_findings
from trainer.doctor.episodes.environment import Environment, environment_findings
from trainer.doctor.finding import Finding

LATER = timedelta(days=400)


def episode_findings(
    environment: Environment,
    tasks: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    rendering: Rendering,
    stop_ids: Sequence[int],
    *,
    parse: Parse | None = None,
    seed_of: Callable[[int, int, int], int] | None = None,
    episodes: Callable[[], object] | None = None,
) -> list[Finding]:
    """What is wrong with a run's environment, chat template and parser (`parse`, for native tool calls).

    `tasks` are those of some examples. `seed_of` and `episodes` as in `environment_findings`; it blocks as that does.
    """
    found = environment_findings(environment, tasks, seed_of=seed_of, episodes=episodes)
    if any(each.cause == "tool_types" for each in found):
        return found
    chat, later = (
        chat_of(tokenizer, replace(rendering, now=now), stop_ids) for now in (rendering.now, rendering.now + LATER)
    )
    # An environment that reads calls from the text answers as the user.
    native = bool(rendering.tools or tools_of(environment)) and not hasattr(environment, "parse")
    found += template_findings(chat, native=native, bos=tokenizer.bos_token_id, redated=later)
    return [*found, *(parser_findings(chat, parse) if native and parse else ())]
