"""What goes wrong in an environment?"""


class ToolError(Exception):
    """The policy's call cannot be done as asked. Its text becomes the observation, and the episode goes on."""


class EnvError(RuntimeError):
    """The environment itself failed. It never becomes a reward: the episode is sampled again."""
