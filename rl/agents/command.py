"""How does a command play an episode? As a process with the address in its environment; its last line is the reward."""

import asyncio
import json
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from rl.agents.context import Context
from rl.environments.types import EnvError
from rl.tools.command import with_python
from rl.typed import shortened, show

MOST_OUTPUT = 2**20
"""Bytes of its output that are kept; a process that writes more is read on."""


def variables(context: Context) -> dict[str, str]:
    """What the process finds in its environment."""
    return {
        "OPENAI_BASE_URL": context.base_url,
        "OPENAI_API_KEY": context.api_key,
        "ANTHROPIC_BASE_URL": context.anthropic_url,
        "ANTHROPIC_API_KEY": context.api_key,
        "UNISON_MODEL": context.model,
        "UNISON_TASK": json.dumps(dict(context.task), default=str),
        "UNISON_MESSAGES": json.dumps(context.messages, default=str),
    }


async def run_command(command: Sequence[str], context: Context) -> Any:
    """The reward that the command prints as its last line: a number, or an object of named parts. Raises EnvError when
    it fails. Whoever cancels this ends the process, and those that it started."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *with_python(command),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        env=os.environ | variables(context),
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        out, err = await asyncio.gather(_end_of(process.stdout), _end_of(process.stderr))
        status = await process.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if status:
        raise EnvError(f"ended with status {status}: {shortened(err.strip()[-500:], 400)}")
    last = out.strip().rpartition("\n")[2]
    try:
        return json.loads(last)
    except json.JSONDecodeError:
        raise EnvError(f"printed {show(last)} as its last line: print the reward, such as 1.0") from None


async def _end_of(stream: asyncio.StreamReader) -> str:
    """The end of what a process writes, up to `MOST_OUTPUT` bytes."""
    kept = b""
    while chunk := await stream.read(2**16):
        kept = (kept + chunk)[-MOST_OUTPUT:]
    return kept.decode(errors="replace")
