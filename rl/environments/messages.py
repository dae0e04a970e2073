"""Is a history what we gave out before? The longest beginning that is, and why the rest is not."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

Reason = Literal["", "edited", "dropped", "tools"]
"""Why a history does not go on from a kept one: a message differs, messages are missing, or other tools are shown."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """The kept history that an asked one goes on from."""

    index: int | None
    """Which of the kept histories; None: no beginning of the asked one was kept."""
    length: int
    """How many messages they have in common."""
    reason: Reason
    """Why the asked one does not go on from the kept one that is most like it; empty where it does."""


def canonical(value: Any) -> Any:
    """A message, or a part of one, in the form in which equal ones are equal.

    A client writes arguments of a call as JSON of its own, adds empty fields, and may give a text as a list of parts.
    """
    if isinstance(value, dict):
        fields = cast(dict[str, Any], value)
        kept = {key: canonical(each) for key, each in fields.items() if each or each not in (None, [], "", {})}
        if isinstance(kept.get("arguments"), str):
            kept["arguments"] = _parsed(kept["arguments"])
        return kept
    if isinstance(value, list | tuple):
        items = [canonical(each) for each in cast(Sequence[Any], value)]
        texts = [each.get("text") if isinstance(each, dict) and each.get("type") == "text" else None for each in items]
        if items and all(isinstance(text, str) for text in texts):
            return "".join(cast(list[str], texts))
        return items
    return value


def find(asked: Sequence[Any], kept: Sequence[Sequence[Any]], tools: Any = (), kept_tools: Sequence[Any] = ()) -> Match:
    """The longest of the `kept` histories that the `asked` one begins with; of equal ones the last.

    Messages are in canonical form, or digests of it. `kept_tools[i]` are the tools that were shown with history i;
    none: always the same.
    """
    best, nearest = Match(index=None, length=0, reason=""), (0, 0, cast(Reason, ""))
    for index, have in enumerate(kept):
        pairs = enumerate(zip(asked, have, strict=False))
        length = next((i for i, (a, b) in pairs if a != b), min(len(asked), len(have)))
        reason = _reason(asked[length:], have[length:])
        if not reason and kept_tools and kept_tools[index] != tools:
            reason = "tools"
        if not reason and length >= best.length:
            best = Match(index=index, length=length, reason="")
        nearest = max(nearest, (length, len(have), reason), key=lambda each: each[:2])
    return replace(best, reason=nearest[2])


def _reason(wanted: Sequence[Any], have: Sequence[Any]) -> Reason:
    """Why the rest of an asked history is not the rest of a kept one."""
    if not have:
        return ""
    return "dropped" if not wanted or wanted[0] in have else "edited"


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except json.JSONDecodeError:
        return arguments
