"""What the policy can call: the methods of an environment, and the tools of an MCP server."""

from rl.tools.mcp import MCP

__all__ = ["MCP"]
