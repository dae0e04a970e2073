"""What does the policy read next, and what did the environment return? Anything but the right form is its fault."""

from collections.abc import Sequence
from typing import Any

from rl.environments.types import EnvError, Messages
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


def spoken(text: str, calls: Sequence[Call], reasoning: str = "") -> dict[str, Any]:
    """A turn of the policy as a chat message."""
    made = [call(each.id, each.name, dict(each.arguments)) for each in calls]
    thought = {"reasoning_content": reasoning} if reasoning else {}
    return {"role": "assistant", "content": text, **thought, **({"tool_calls": made} if made else {})}


def call(identity: str, name: str, arguments: Any) -> dict[str, Any]:
    """A tool call in an assistant's message, with its arguments as an object where they are one."""
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


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
    if isinstance(calls, list | tuple) and all(isinstance(each, Call) for each in calls):
        return tuple(calls)
    raise EnvError(f"`parse` returned {show(found, SHOWN)}: return a list of Call(name='...', arguments={{...}})")


def as_text(result: Any, what: str) -> str:
    """What a tool returned, as the policy reads it. Raises EnvError for what no policy can read."""
    if isinstance(result, bytes) or type(result).__repr__ is object.__repr__:
        raise EnvError(f"{what} returned {show(result, SHOWN)}: return text, numbers, or lists and dicts of them")
    return text_of(result)
