"""Where is user code awaited? On one event loop for each kind of it, in a daemon thread: never on the driver's."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable
from functools import cache
from typing import Any


def awaited_on(kind: str, result: Awaitable[Any]) -> concurrent.futures.Future[Any]:
    """Await something on the one event loop of this kind: so all of the kind can share a client and its connections."""
    return asyncio.run_coroutine_threadsafe(awaited(result), _loop_of(kind))


async def awaited(result: Awaitable[Any]) -> Any:
    """Any awaitable as a coroutine."""
    return await result


@cache
def _loop_of(kind: str) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name=kind).start()
    return loop
