"""What the policy can call: the methods of an environment, and the tools of a server that speaks MCP."""

from rl.tools.mcp import MCP

__all__ = ["MCP"]
