"""Which tools has an environment, and what happens with wrong arguments?"""

import asyncio
import enum
from typing import Annotated, Any, Literal

import pytest

from rl.environments.types import ToolError
from rl.tools.methods import bind, schemas, text_of, tools_of
from rl.types import Call


class Unit(enum.Enum):
    metre = "m"
    foot = "ft"


class Shared:
    def inherited(self) -> str:
        """From a parent."""
        return "parent"


class World(Shared):
    """Every kind of argument."""

    limit = 3

    def __init__(self):
        self.factor = 10
        self.add = "an attribute of the instance is not the tool"

    def start(self):
        return []

    def reward(self, episode):
        return 1.0

    def reply(self, turn):
        return None

    def parse(self, text):
        return []

    def close(self):
        return None

    def _hidden(self, x):
        return x

    @property
    def state(self):
        raise RuntimeError("a property is not read")

    def add(self, a: int, b: int = 2, *, scale: float = 1.0) -> float:
        """Add two integers.

        It takes
        two lines.

        Args:
            a: The first.
            b (int, optional): The second,
                on two lines: with a colon.

        Returns:
            float: The sum.
        """
        return (a + b) * scale * self.factor

    async def wait(self, unit: Unit, how: Literal["fast", 3], names: list[str] | None = None) -> str:
        return f"{unit.name} {how} {names}"

    def pack(self, sizes: dict[str, float], pair: tuple[int, str], rest: tuple[int, ...] = ()) -> Any:
        return [sizes, pair, rest]

    def say(self, text: Annotated[str, "What to say."], loud: bool = False, either: int | str = 0) -> Any:
        return [text, loud, either]

    @staticmethod
    def double(x: float) -> float:
        return 2 * x


def call(name: str, **arguments: Any) -> Any:
    return bind(World(), Call(name=name, arguments=arguments))()


def test_tools_are_the_public_methods_without_those_of_the_run():
    names = [tool.name for tool in tools_of(World)]
    assert names == ["inherited", "add", "wait", "pack", "say", "double"]
    assert tools_of(World()) == tools_of(World)


def test_a_schema_has_the_signature_and_the_docstring():
    by_name = {schema["function"]["name"]: schema for schema in schemas(World)}
    assert by_name["add"] == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two integers. It takes two lines.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "The first."},
                    "b": {"type": "integer", "description": "The second, on two lines: with a colon.", "default": 2},
                    "scale": {"type": "number", "default": 1.0},
                },
                "required": ["a"],
            },
        },
    }
    wait, pack, say = (by_name[n]["function"]["parameters"]["properties"] for n in ("wait", "pack", "say"))
    assert wait == {
        "unit": {"type": "string", "enum": ["m", "ft"]},
        "how": {"enum": ["fast", 3]},
        "names": {"type": "array", "items": {"type": "string"}, "nullable": True},
    }
    assert pack["sizes"] == {"type": "object", "additionalProperties": {"type": "number"}}
    assert pack["pair"]["prefixItems"] == [{"type": "integer"}, {"type": "string"}]
    assert say["text"] == {"type": "string", "description": "What to say."}
    assert say["either"] == {"anyOf": [{"type": "integer"}, {"type": "string"}], "default": 0}


def test_arguments_are_converted_without_loss():
    assert call("add", a=3.0) == 50.0
    assert call("add", a=1, b=1, scale=2) == 40.0
    assert asyncio.run(call("wait", unit="ft", how=3, names=None)) == "foot 3 None"
    assert call("pack", sizes={"a": 1}, pair=[1, "x"], rest=[1, 2.0]) == [{"a": 1.0}, (1, "x"), (1, 2)]
    assert call("say", text="hi", either="3") == ["hi", False, "3"]
    assert call("double", x=2) == 4.0
    assert call("inherited") == "parent"


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("ad", {}, "there is no tool 'ad'; the tools are: inherited, add, wait, pack, say, double"),
        ("reward", {}, "there is no tool 'reward'"),
        ("_hidden", {"x": 1}, "there is no tool '_hidden'"),
        ("add", {}, "add needs the argument 'a'; it takes: a, b, scale"),
        ("inherited", {"a": 1}, "inherited has no argument 'a'; it takes none"),
        ("add", {"a": 1, "c": 2}, "add has no argument 'c'; it takes: a, b, scale"),
        ("add", {"a": "3"}, "the argument 'a' of add must be an integer, not '3'"),
        ("add", {"a": 3.5}, "the argument 'a' of add must be an integer, not 3.5"),
        ("add", {"a": True}, "the argument 'a' of add must be an integer, not True"),
        ("add", {"a": float("inf")}, "the argument 'a' of add must be an integer, not inf"),
        ("add", {"a": 1, "scale": float("nan")}, "the argument 'scale' of add must be a number, not nan"),
        ("add", {"a": None}, "the argument 'a' of add must be an integer, not None"),
        ("say", {"text": 3}, "the argument 'text' of say must be a text, not 3"),
        ("say", {"text": "", "loud": 1}, "the argument 'loud' of say must be true or false, not 1"),
        ("say", {"text": "", "either": []}, "the argument 'either' of say must be an integer or a text, not []"),
        ("wait", {"unit": "km", "how": 3}, "the argument 'unit' of wait must be one of 'm', 'ft', not 'km'"),
        ("wait", {"unit": "m", "how": True}, "the argument 'how' of wait must be one of 'fast', 3, not True"),
        ("wait", {"unit": "m", "how": 3, "names": [1]}, "the argument 'names' of wait must be a list or null, not [1]"),
        ("pack", {"sizes": {"a": "b"}, "pair": [1, "x"]}, "the argument 'a' in 'sizes' of pack must be a number"),
        ("pack", {"sizes": [], "pair": [1, "x"]}, "the argument 'sizes' of pack must be an object, not []"),
        ("pack", {"sizes": {}, "pair": [1]}, "the argument 'pair' of pack must have 2 values, not 1"),
    ],
)
def test_a_wrong_call_is_an_error_that_the_policy_can_read(name, arguments, text):
    with pytest.raises(ToolError) as caught:
        call(name, **arguments)
    assert str(caught.value).startswith(text)


def wrong(method: Any) -> type:
    return type("Wrong", (), {"run": method})


def untyped(self, a):
    return a


def many(self, *a: int):
    return a


def odd(self, a: set[int]):
    return a


def unknown(self, a: "Missing"):  # pyright: ignore
    return a


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (untyped, "argument 'a' of the tool Wrong.run has no type: write a: int .*call it _run"),
        (many, "argument 'a' of the tool Wrong.run has no name of its own"),
        (odd, "has the type set.*, which JSON does not have"),
        (unknown, "the types of Wrong.run cannot be read: name 'Missing'"),
    ],
)
def test_a_method_that_has_no_schema_is_an_error_with_the_remedy(method, text):
    with pytest.raises(ValueError, match=text):
        tools_of(wrong(method))


def test_a_result_is_text_or_json():
    assert text_of("as it is") == "as it is"
    assert text_of(None) == ""
    assert text_of({"a": [1, 2.5, None]}) == '{"a": [1, 2.5, null]}'
    assert text_of(Unit.foot) == "Unit.foot"
    assert text_of({1}) == "{1}"
