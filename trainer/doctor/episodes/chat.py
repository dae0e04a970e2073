"""What does the run's chat template lose, change or refuse over many turns?"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from rl.environments.template import ASKED, WORDS, Chat, Message, TemplateError
from rl.typed import show
from trainer.doctor.finding import Finding

CALL, DESCRIBED, ARGUMENT = "sentinelTool", "sentinel description", "sentinelArgument"
IDS = ("call00001", "call00002")
RESULTS = ("firstResult7Q", "secondResult7Q")
MORE: Message = {"role": "user", "content": "moreWords7Q"}
THOUGHT = "thought7Q"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": CALL,
        "description": DESCRIBED,
        "parameters": {"type": "object", "properties": {ARGUMENT: {"type": "string", "description": "text"}}},
    },
}


def found(cause: str, evidence: str, severity: Literal["fault", "warning"] = "fault") -> Finding:
    """A finding about the chat template."""
    return Finding(cause=cause, severity=severity, where="chat template", evidence=evidence)


def results(count: int) -> list[Message]:
    """So many results of calls, as an environment sends them."""
    pairs = zip(IDS[:count], RESULTS, strict=False)
    return [{"role": "tool", "name": CALL, "tool_call_id": i, "content": text} for i, text in pairs]


def made(count: int) -> list[tuple[str, str]]:
    """The calls (name, id) of these results."""
    return [(CALL, i) for i in IDS[:count]]


def template_findings(
    chat: Chat, *, native: bool, bos: int | None = None, redated: Chat | None = None
) -> list[Finding]:
    """What is wrong with a template for episodes.

    `native`: calls and results are messages of the template; otherwise the environment reads calls from the text, and
    answers as the user. `bos` is the begin-of-text token. `redated` is the same chat on another day.
    """
    shown = list(_words(chat))
    if shown:
        return shown
    # With one tool of our own, whose parts can be looked for.
    tooled = replace(chat, tools=[TOOL])
    lost = [*_tools(tooled), *_calls(tooled), *_results(tooled)] if native else []
    counts = [n for n in (1, 2) if native and not _refusal(tooled, n)]
    asked = tooled if native else replace(chat, tools=())
    more = [*_delta(asked, counts), *_prefix(asked), *_close(asked, counts), *_start(asked, bos, redated)]
    return [*lost, *more, *(_moves(asked) if native else ())]


def _words(chat: Chat) -> Iterator[Finding]:
    """Words of user and assistant, without which nothing else can be examined."""
    try:
        chat.delta([MORE], [])
        text = chat.text([ASKED, chat.turn([]), MORE], True)
    except TemplateError as error:
        hidden = "does not show" in str(error)
        yield found("words_not_shown" if hidden else "template_refuses", str(error))
        return
    if MORE["content"] not in text:
        yield found("words_not_shown", f"a user's message {show(MORE['content'])} is not in the text")


def _tools(chat: Chat) -> Iterator[Finding]:
    text = chat.text([ASKED], True)
    parts = {"name": CALL, "description": DESCRIBED, "arguments": ARGUMENT}
    if missing := [part for part, word in parts.items() if word not in text]:
        yield found("tools_not_shown", f"of a tool, the {', '.join(missing)} is not in the prompt")


def _calls(chat: Chat) -> Iterator[Finding]:
    try:
        chat.after_words(made(1), [])
        text, plain = (chat.text([ASKED, chat.turn(calls)], False) for calls in (made(1), []))
    except TemplateError:
        return  # reported with the results
    # Templates may leave out the words of a turn that has calls.
    named = text.count(CALL) > plain.count(CALL)
    if not named and text.count(WORDS) <= plain.count(WORDS):
        yield found("calls_not_shown", "a call in an assistant's message is not in the text", "warning")


def _refusal(chat: Chat, count: int) -> str:
    """Why the template cannot write so many results; empty if it can."""
    try:
        chat.delta(results(count), [])
    except TemplateError as error:
        return str(error)
    return ""


def _results(chat: Chat) -> Iterator[Finding]:
    if why := _refusal(chat, 1):
        yield found("template_refuses", why)
        return
    if why := _refusal(chat, 2):
        yield found("one_call_a_turn", why, "warning")
    for count in (1, 2):
        if not _refusal(chat, count):
            text = chat.text([ASKED, chat.turn(made(count)), *results(count)], True)
            if missing := [word for word in RESULTS[:count] if word not in text]:
                yield found("results_not_shown", f"of {count} result(s), {len(missing)} are not in the text")
                return


def _earlier(chat: Chat, count: int) -> Iterator[tuple[str, list[Message]]]:
    """Beginnings of a conversation that a delta must not depend on."""
    answered = [ASKED, {"role": "assistant", "content": "Answer."}]
    yield "after a system message", [{"role": "system", "content": "Rules."}, ASKED]
    yield "in the third turn", [*answered, ASKED, {"role": "assistant", "content": "Answer."}, ASKED]
    thinking: list[Message] = [{**answered[1], "reasoning_content": THOUGHT}]
    yield "after a turn with reasoning", [ASKED, *thinking, ASKED]
    if count:
        # A template that numbers its calls goes on counting.
        yield "after an earlier call", [ASKED, chat.turn(made(1)), *results(1), *answered[1:], ASKED]


def _delta(chat: Chat, counts: list[int]) -> Iterator[Finding]:
    for count in (0, *counts):
        messages, calls = (results(count), made(count)) if count else ([MORE], [])
        usual = chat.after_words(calls, messages)
        name = {0: "a user's message", 1: "one result", 2: "two results"}[count]
        try:
            others = {"of a turn with reasoning": chat.after_words(calls, messages, (ASKED,), THOUGHT)}
        except TemplateError:
            others = {}
        for where, before in _earlier(chat, count):
            try:
                others[where] = chat.after_words(calls, messages, tuple(before))
            except TemplateError:
                continue  # not every template has a system role, or takes arguments as a dict
        if differing := [where for where, ids in others.items() if ids != usual]:
            yield found("delta_differs", f"{name} adds other tokens {differing[0]}")
            return


def _prefix(chat: Chat) -> Iterator[Finding]:
    prompt, turn = chat.text([ASKED], True), chat.text([ASKED, chat.turn([])], False)
    if not turn.startswith(prompt):
        same = next((i for i, (a, b) in enumerate(zip(prompt, turn, strict=False)) if a != b), len(turn))
        yield found("prefilled", f"the generation prompt ends with {show(prompt[same:])}, a finished turn has "
                    f"{show(turn[same : same + 20])} there", "warning")  # fmt: skip


def _close(chat: Chat, counts: list[int]) -> Iterator[Finding]:
    alone, full = chat.after_words([], []), chat.after_words([], [MORE])
    close = chat.close_of(alone)
    if close is None and full[:1] and full[0] in chat.stop_ids:
        return  # The policy stops at the opener of the next role.
    if close is None:
        blank = not alone or alone == chat.encode(" ") or alone == chat.encode("\n")
        if blank:
            yield found("no_close_token", "the template closes no turn, and begins none with a stop token", "warning")
        else:
            yield found("close_token", f"the template closes a turn with {len(alone)} token(s), at none of which the "
                        f"sampler stops (it stops at {sorted(chat.stop_ids)})")  # fmt: skip
        return
    if full[: close + 1] != alone[: close + 1]:
        yield found("close_differs", "a last turn is closed by another token than one in the past", "warning")
    for count in counts:
        if chat.close_of(chat.after_words(made(count), [])) is None:
            yield found("close_token", "a turn with calls is closed by no token at which the sampler stops")
            return


def _start(chat: Chat, bos: int | None, redated: Chat | None) -> Iterator[Finding]:
    prompt = chat.prompt([ASKED])
    if bos is not None and prompt[:2] == [bos, bos]:
        yield found("bos_twice", "a prompt begins with the begin-of-text token twice")
    if redated is not None:
        same = replace(redated, tools=chat.tools)
        if same.text([ASKED], True) != chat.text([ASKED], True):
            yield found("dated", "the template writes the date", "warning")


def _moves(chat: Chat) -> Iterator[Finding]:
    said = chat.text([ASKED, chat.turn([]), MORE], True).rpartition(WORDS)[2]
    if CALL in said:
        yield found("tools_move", "the tools stand in front of the last user's message", "warning")
