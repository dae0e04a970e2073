"""Which tools does a server of the Model Context Protocol (MCP) have, and how is one called?

Each process that has environments has a server of its own. It is started with the first call, and again after it died.
"""

import asyncio
import atexit
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import IO, Any

from rl.errors import first_error
from rl.judges.loops import awaited_on
from rl.tools.command import with_python
from rl.tools.errors import EnvError, ToolError
from rl.typed import Checked, show
from rl.types import Call

ANSWER_S = 5.0
"""Seconds for an answer of a server that did not answer a call. After that another one is started."""
END_S = 6.0
"""Seconds for the end of a server. It is asked to end, then told, then killed."""


@dataclass(frozen=True, kw_only=True)
class MCP(Checked):
    """A server that has tools: a `command` that is started, or the `url` of one that runs. `MCP()` is none.

    A server knows nothing of episodes. What a tool changes there is changed for all of them.
    """

    command: tuple[str, ...] = ()
    """Program and arguments of a server that uses its standard input and output."""
    url: str = ""
    """Address of a server over HTTP, such as http://localhost:8000/mcp."""
    variables: tuple[str, ...] = ()
    """Names of environment variables that the command gets, besides PATH, HOME and a few others."""

    def __post_init__(self) -> None:
        if self.command and self.url:
            raise ValueError(f"tools: MCP has a command and url={show(self.url)}: give one of them")

    def __bool__(self) -> bool:
        return bool(self.command or self.url)

    @classmethod
    def right_form(cls, field: str, value: Any) -> str | None:
        """How to write the command."""
        if field == "command" and isinstance(value, str):
            return f"is text: write its parts, command={value.split()!r}"
        return None


@cache
def server_of(source: MCP) -> "Server":
    """The server of this process."""
    return Server(source)


class Server:
    """A server and the connection to it."""

    def __init__(self, source: MCP) -> None:
        self.source = source
        self._connection: _Connection | None = None
        atexit.register(self.close)

    def schemas(self, seconds: float) -> list[dict[str, Any]]:
        """The tools, as the server describes them, in the form of OpenAI's interface. Raises EnvError."""
        try:
            return awaited_on("MCP", self._connected()).result(seconds).schemas
        except TimeoutError:
            raise EnvError(f"{self._name} did not list its tools in {seconds:g} s") from None

    async def call(self, call: Call) -> str:
        """What the tool returns. Raises ToolError for what it cannot do, and EnvError when the server is lost."""
        try:
            return await asyncio.wrap_future(awaited_on("MCP", self._call(call)))
        except asyncio.CancelledError:  # it is late, or its episode has ended
            if self._connection is not None:
                self._connection.in_doubt = True
            raise

    def close(self) -> None:
        """End the server. The next call starts another one."""
        if self._connection is not None:
            with suppress(TimeoutError):
                awaited_on("MCP", self._connection.end()).result(END_S)

    async def _call(self, call: Call) -> str:
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED, INVALID_PARAMS

        connection = await self._connected()
        names = [schema["function"]["name"] for schema in connection.schemas]
        if call.name not in names:
            raise ToolError(f"there is no tool {show(call.name)}; the server has: {', '.join(names)}")
        try:
            result = await connection.client.call_tool(call.name, dict(call.arguments))
        except MCPError as error:
            if error.code == INVALID_PARAMS:
                raise ToolError(error.message) from None
            if error.code == CONNECTION_CLOSED:
                connection.over.set()
                raise EnvError(f"lost {self._name}") from None
            raise EnvError(f"got an error from {self._name}: {error.message}") from None
        if result.is_error:
            raise ToolError(_text(result))
        return _text(result)

    async def _connected(self) -> "_Connection":
        """The connection to a server that answers."""
        now = self._connection
        if now is not None and now.in_doubt and now.ready.done():
            if await now.answers():
                now.in_doubt = False
            else:
                now.over.set()
        if self._connection is None or self._connection.over.is_set():
            self._connection = _Connection(self.source, self._name)
            self._connection.serving = asyncio.create_task(self._connection.serve())
        connection = self._connection
        await asyncio.shield(connection.ready)
        return connection

    @property
    def _name(self) -> str:
        return f"the MCP server {self.source.url or ' '.join(self.source.command)!r}"


@dataclass
class _Connection:
    source: MCP
    name: str
    client: Any = None
    schemas: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    in_doubt: bool = False
    """Whether a call was given up that it did not answer."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    ready: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    serving: asyncio.Task[None] | None = None

    async def end(self) -> None:
        self.over.set()
        assert self.serving is not None, "a connection is served from its beginning"
        await self.serving

    async def answers(self) -> bool:
        try:
            async with asyncio.timeout(ANSWER_S):
                await self.client.list_tools()
            return True
        except Exception:  # whatever it is, this server is not used again
            return False

    async def serve(self) -> None:
        """Keep a server until it is over. One task opens and closes the connection, as its library demands."""
        from mcp import Client

        with tempfile.TemporaryFile("w+") as log:
            try:
                async with Client(self._transport(log), cache=None) as self.client:
                    page = await self.client.list_tools()
                    tools = list(page.tools)
                    while page.next_cursor:
                        page = await self.client.list_tools(cursor=page.next_cursor)
                        tools += page.tools
                    self.schemas = [_schema(tool) for tool in tools]
                    self.ready.set_result(None)
                    await self.over.wait()
            except Exception as error:  # of the library, of the server's start, or of the transport's tasks
                cause = first_error(error) if isinstance(error, ExceptionGroup) else error
                if not self.ready.done():
                    log.seek(0)
                    printed = log.read().strip().splitlines()
                    why = printed[-1] if printed else f"{type(cause).__name__}: {cause}"
                    tried = "reach" if self.source.url else "start"
                    self.ready.set_exception(EnvError(f"cannot {tried} {self.name}: {why}"))
            finally:
                self.over.set()

    def _transport(self, log: IO[str]) -> Any:
        if self.source.url:
            return self.source.url
        from mcp import StdioServerParameters, stdio_client

        program, *arguments = with_python(self.source.command)
        if unset := [name for name in self.source.variables if name not in os.environ]:
            raise EnvError(f"the environment variable {unset[0]} is not set")
        variables = {name: os.environ[name] for name in self.source.variables}
        # What the server prints about each request would fill the terminal.
        return stdio_client(StdioServerParameters(command=program, args=arguments, env=variables), errlog=log)  # pyright: ignore


def _schema(tool: Any) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _text(result: Any) -> str:
    """A result as text; a picture or a sound is named only."""
    parts = [getattr(part, "resource", part) for part in result.content]
    return "\n".join(getattr(part, "text", f"[{getattr(part, 'type', 'data')}]") for part in parts)
