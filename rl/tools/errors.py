"""Whose error is it: the policy's, which reads it, or the environment's, which is played again?"""

from rl.protocols import EnvError as EnvError


class ToolError(Exception):
    """What the policy asked for cannot be done. The policy reads the message as the result of its call."""


class EnvLate(EnvError):
    """The environment, or the engine, took longer than a limit allows."""
