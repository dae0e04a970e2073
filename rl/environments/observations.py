"""What does the policy read next, and what did the environment return? Anything but the right form is its fault."""

from typing import Any

from rl.environments.types import EnvError, Messages, Turn
from rl.judges.hearing import JudgeError
from rl.tools.methods import text_of
from rl.typed import shortened, show
from rl.types import Call

SHOWN = 180
"""About how many characters of a value or an error are in a message."""


def fault(what: str, error: Exception) -> EnvError:
    """An error of the environment, which names the method."""
    if isinstance(error, JudgeError):
        return JudgeError(f"{what} got no verdict: {error}")
    if isinstance(error, EnvError):
        return type(error)(f"{what} {error}")
    return EnvError(f"{what} raised {type(error).__name__}: {shortened(str(error), SHOWN)}")


def user(text: str) -> Messages:
    """A text that the policy reads as the user's."""
    return [{"role": "user", "content": text}]


def spoken(turn: Turn) -> dict[str, Any]:
    """A turn of the policy as a chat message."""
    message: dict[str, Any] = {"role": "assistant", "content": turn.text}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if turn.calls:
        message["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}}
            for c in turn.calls
        ]
    return message


def as_messages(given: Any, what: str) -> Messages:
    """A text or messages, as messages. Raises EnvError for anything else."""
    if isinstance(given, str):
        return user(given)
    if isinstance(given, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in given):
        return given
    raise EnvError(f"{what} returned {show(given, SHOWN)}: return text, or messages with a role and a content each")


def as_calls(found: Any) -> tuple[Call, ...]:
    """What `parse` returned, as calls. Raises EnvError for anything else."""
    calls = () if found is None else (found,) if isinstance(found, Call) else found
    if isinstance(calls, list | tuple) and all(isinstance(call, Call) for call in calls):
        return tuple(calls)
    raise EnvError(f"`parse` returned {show(found, SHOWN)}: return a list of Call(name='...', arguments={{...}})")


def as_text(result: Any, what: str) -> str:
    """What a tool returned, as the policy reads it. Raises EnvError for what no policy can read."""
    if isinstance(result, bytes) or type(result).__repr__ is object.__repr__:
        raise EnvError(f"{what} returned {show(result, SHOWN)}: return text, numbers, or lists and dicts of them")
    return text_of(result)
