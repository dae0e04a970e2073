"""Which tools does an environment have, and how is one called?"""

import enum
import inspect
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from rl.tools.arguments import KINDS, fit, schema_of
from rl.tools.docstring import described
from rl.tools.errors import ToolError
from rl.typed import show
from rl.types import Call

NEVER = frozenset({"start", "parse", "call", "reply", "reward", "close"})
"""Public methods that an environment has for the run, not for the policy."""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A method that the policy can call."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of the arguments."""
    hints: Mapping[str, Any]
    """Declared type by argument."""
    required: tuple[str, ...]

    @property
    def schema(self) -> dict[str, Any]:
        """The tool as chat templates and OpenAI's interface have it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def tools_of(environment: object) -> tuple[Tool, ...]:
    """The tools of an environment's class (or of an instance's): its public methods, in the order of the source.

    Raises ValueError for a method without the types that a schema needs.
    """
    return _tools_of(environment if isinstance(environment, type) else type(environment))


def schemas(environment: object) -> list[dict[str, Any]]:
    """The schema of every tool, for a chat template."""
    return [tool.schema for tool in tools_of(environment)]


def has(environment: object, name: str) -> bool:
    """Whether an environment has this tool."""
    return any(tool.name == name for tool in tools_of(environment))


def bind(environment: object, call: Call) -> Callable[[], Any]:
    """The call with checked arguments, ready to run; it returns an awaitable where the method is async.

    Numbers are converted without loss (3.0 for an integer, 3 for a number), lists to tuples, values to enums. Raises
    ToolError for an unknown tool, and for missing, unknown and wrong arguments. Tools that are no methods, such as
    those of the example, go to the environment's `call`, where it has one.
    """
    tools = {tool.name: tool for tool in tools_of(environment)}
    own: Any = getattr(environment, "call", None)
    if call.name not in tools and callable(own):
        return partial(own, call.name, dict(call.arguments))
    if call.name not in tools:
        known = f"the tools are: {', '.join(tools)}" if tools else "there are no tools"
        raise ToolError(f"there is no tool {show(call.name)}; {known}")
    arguments = checked(tools[call.name], call.arguments)
    # From the class: an attribute of the instance must not stand in for a tool.
    method = inspect.getattr_static(type(environment), call.name).__get__(environment, type(environment))
    return partial(method, **arguments)


def checked(tool: Tool, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the method declares them. Raises ToolError with a text for the policy."""
    takes = f"it takes: {', '.join(tool.hints)}" if tool.hints else "it takes none"
    if unknown := [name for name in arguments if name not in tool.hints]:
        raise ToolError(f"{tool.name} has no argument {show(unknown[0])}; {takes}")
    if missing := [name for name in tool.required if name not in arguments]:
        raise ToolError(f"{tool.name} needs the argument {show(missing[0])}; {takes}")
    return {name: fit(value, tool.hints[name], f"{name!r} of {tool.name}") for name, value in arguments.items()}


def text_of(result: object) -> str:
    """What a tool returned, as the policy reads it: text as it is, nothing for None, else JSON where possible."""
    if result is None or isinstance(result, str):
        return result or ""
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(result)


@lru_cache(maxsize=256)
def _tools_of(cls: type) -> tuple[Tool, ...]:
    methods: dict[str, Any] = {}
    for each in reversed(cls.__mro__[:-1]):
        methods |= {n: each.__dict__[n] for n in each.__dict__ if not n.startswith("_") and n not in NEVER}
    plain = {name: getattr(m, "__func__", m) for name, m in methods.items()}
    return tuple(_tool(cls, name, method) for name, method in plain.items() if inspect.isfunction(method))


def _tool(cls: type, name: str, method: Callable[..., Any]) -> Tool:
    where = f"{cls.__name__}.{name}"
    static = isinstance(inspect.getattr_static(cls, name), staticmethod)
    declared = list(inspect.signature(method).parameters.values())[0 if static else 1 :]
    try:
        hints = typing.get_type_hints(method, include_extras=True)
    except NameError as error:
        raise ValueError(f"the types of {where} cannot be read: {error}; import them at the top of the file") from None
    summary, about = described(inspect.getdoc(method) or "")
    properties: dict[str, Any] = {}
    for parameter in declared:
        at = f"argument {parameter.name!r} of the tool {where}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"{at} has no name of its own: write each argument out, or call the method _{name}")
        if parameter.name not in hints:
            raise ValueError(
                f"{at} has no type: write {parameter.name}: int (or {KINDS}); if the policy must not call this "
                f"method, call it _{name}"
            )
        schema = schema_of(hints[parameter.name], at)
        if text := about.get(parameter.name, schema.get("description", "")):
            schema["description"] = text
        if parameter.default is not parameter.empty and parameter.default is not None:
            default = parameter.default
            schema["default"] = default.value if isinstance(default, enum.Enum) else default
        properties[parameter.name] = schema
    required = [p.name for p in declared if p.default is p.empty]
    return Tool(
        name=name,
        description=summary,
        parameters={"type": "object", "properties": properties, "required": required},
        hints={p.name: hints[p.name] for p in declared},
        required=tuple(required),
    )
