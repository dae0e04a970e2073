"""Does the run's parser read the calls that its chat template writes, and see broken ones as broken?"""

from collections.abc import Callable
from dataclasses import replace

from rl.environments.template import ASKED, WORDS, Chat, TemplateError
from rl.types import FinishReason, Parsed
from trainer.doctor.episodes.chat import CALL, TOOL, made
from trainer.doctor.finding import Finding

Parse = Callable[[list[int], FinishReason], Parsed]
"""Token ids of a reply and why it ended, as the engine's parser reads them."""


def parser_findings(chat: Chat, parse: Parse) -> list[Finding]:
    """What is wrong with a parser of native calls. Nothing can be said of a template that writes no calls."""
    tooled = replace(chat, tools=[TOOL])
    try:
        rest = tooled.after_words(made(1), [])
        text = tooled.text([ASKED, tooled.turn(made(1))], False)
    except TemplateError:
        return []
    opened, closed = (tooled.text([ASKED], opens) for opens in (True, False))
    # Without the generation prompt, which the policy does not sample.
    reply = tooled.encode(text.removeprefix(opened if text.startswith(opened) else closed))
    if CALL not in text.removeprefix(closed):
        return []
    body = reply[: len(reply) - len(rest)]
    close = tooled.close_of(rest)
    whole = [*body, *rest[: len(rest) if close is None else close + 1]]
    found: list[Finding] = []

    def add(cause: str, evidence: str) -> None:
        found.append(Finding(cause=cause, severity="fault", where="parser", evidence=evidence))

    parsed = parse(whole, "stop")
    calls = [(call.name, dict(call.arguments)) for call in parsed.calls]
    if calls != [(CALL, {"text": WORDS})] or parsed.malformed:
        why = parsed.malformed or f"it became {calls or 'an answer without a call'}"
        add("calls_not_parsed", f"a call as the chat template writes it is not read: {why}")
        return found
    for reason in ("stop", "length"):
        broken = parse(body, reason)
        if broken.calls or not broken.malformed:
            became = "a call" if broken.calls else "an answer"
            add("broken_call_taken", f"a call without its end, in a reply that ended by {reason}, became {became}")
            break
    return found
