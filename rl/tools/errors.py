"""Whose error is it: the policy's, which reads it, or the environment's, which is played again?"""


class ToolError(Exception):
    """What the policy asked for cannot be done. The policy reads the message as the result of its call."""


class EnvError(RuntimeError):
    """The environment failed, and the policy did not cause it. The episode is played again; it never gets a reward."""


class EnvLate(EnvError):
    """The environment, or the engine, took longer than a limit allows."""
