"""An MCP server over standard input and output, or over HTTP with a port as its argument. Some of its tools fail."""

import os
import sys
import time
from pathlib import Path

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("shop", log_level="WARNING")


@server.tool()
def price(thing: str, count: int = 1) -> str:
    """The price of things."""
    if thing not in ("tea", "salt"):
        raise ToolError(f"there is no {thing}")
    return f"{len(thing) * count} euros"


@server.tool()
def process() -> str:
    """The number of this process."""
    return str(os.getpid())


@server.tool()
def variable(key: str) -> str:
    """A variable of its environment."""
    return os.environ.get(key, "not set")


@server.tool()
def die_once(file: str) -> str:
    """Ends the server with the first call."""
    if not Path(file).exists():
        Path(file).touch()
        os._exit(1)
    return "alive"


@server.tool()
def wait_for(file: str) -> str:
    """Returns when a file exists; other calls are answered meanwhile."""
    while not Path(file).exists():
        time.sleep(0.01)
    return "it exists"


@server.tool()
async def hang() -> str:
    """Answers nothing any more, neither this call nor another."""
    while True:
        time.sleep(1000)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run()
