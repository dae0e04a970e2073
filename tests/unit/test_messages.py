"""Which kept history does an asked one go on from, and why does it not?"""

import pytest

from rl.environments.messages import Match, canonical, find

ASKED = {"role": "user", "content": "2 + 3?"}
CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "a", "content": "5"}
SAID = {"role": "assistant", "content": "It is 5."}
MORE = {"role": "user", "content": "And 7?"}


@pytest.mark.parametrize(
    "other",
    [
        {**CALLED, "content": None},
        {"role": "assistant", "tool_calls": [CALL], "refusal": None, "annotations": []},
        {**CALLED, "tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"b":3,"a":2}'}}]},
        {**CALLED, "tool_calls": [{**CALL, "function": {"arguments": {"a": 2, "b": 3}, "name": "add"}}]},
    ],
)
def test_what_a_client_writes_in_another_way_is_the_same(other):
    assert canonical(other) == canonical(CALLED)
    assert canonical({**SAID, "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "5."}]}) == SAID


@pytest.mark.parametrize(
    "other",
    [
        {**CALLED, "tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"a": 2, "b": 4}'}}]},
        {**CALLED, "tool_calls": [{**CALL, "function": {"name": "add", "arguments": "2, 3"}}]},
        {**CALLED, "content": "Now:"},
        {"role": "assistant", "content": ""},
    ],
)
def test_another_message_is_another_message(other):
    assert canonical(other) != canonical(CALLED)
    assert canonical({**SAID, "content": "It is 5. "}) != canonical(SAID)


def test_the_longest_history_is_found():
    kept = [[ASKED], [ASKED, CALLED], [MORE, SAID]]
    assert find([ASKED, CALLED, RESULT], kept) == Match(index=1, length=2, reason="")
    assert find([ASKED, CALLED], kept) == Match(index=1, length=2, reason="")
    assert find([MORE, SAID, ASKED], kept) == Match(index=2, length=2, reason="")
    assert find([ASKED], []) == Match(index=None, length=0, reason="")


def test_the_reason_of_a_mismatch_is_named():
    kept = [[ASKED, CALLED, RESULT, SAID]]
    assert find([ASKED, CALLED, {**RESULT, "content": "6"}, SAID, MORE], kept).reason == "edited"
    assert find([ASKED, SAID, MORE], kept).reason == "dropped"
    assert find([ASKED, CALLED], kept).reason == "dropped"
    assert find([MORE], kept).reason == "edited"
    assert find([*kept[0], MORE], kept, tools=["new"], kept_tools=[["old"]]) == Match(
        index=None, length=0, reason="tools"
    )
    assert find([*kept[0], MORE], kept, tools=["old"], kept_tools=[["old"]]) == Match(index=0, length=4, reason="")


def test_a_shorter_history_is_used_and_the_reason_still_named():
    kept = [[ASKED, CALLED], [ASKED, CALLED, RESULT, SAID]]
    edited = [ASKED, CALLED, {**RESULT, "content": "6"}, MORE]
    assert find(edited, kept) == Match(index=0, length=2, reason="edited")
    assert find([ASKED, CALLED, RESULT, SAID, MORE], kept) == Match(index=1, length=4, reason="")
