"""Where in the user's files did an error of the data begin?"""

import traceback
from pathlib import Path

from trainer.runs.own_code import INSTALLED

OURS = Path(__file__).parents[2]
PACKAGES = tuple(OURS / name for name in ("rl", "rollout", "trainer"))


def place_of(error: BaseException) -> str:
    """The innermost line of an error that is neither ours nor installed, in brackets; empty where there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        parents = Path(frame.filename).resolve().parents
        # A dataclass has its __init__ in "<string>".
        if frame.filename != "<string>" and not any(folder in parents for folder in (*PACKAGES, *INSTALLED)):
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""
