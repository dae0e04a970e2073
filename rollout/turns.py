"""When does an engine sample, and when does it stand still: paused for an update, or asleep without its memory?"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from rl.config import Config


class Turns:
    """The methods of `rollout.engine.Engine` that stop sampling. Requests are kept meanwhile."""

    config: Config
    llm: Any
    _await_vllm: Callable[[Awaitable[Any]], Awaitable[Any]]
    open: asyncio.Event
    """Set while new requests may reach vLLM."""
    updating: bool
    """True while an update is changing the live weights."""
    aside = False
    """Whether updates arrive in spare memory first."""
    asleep = False
    """From `sleep` to `wake`."""
    mapped = True
    """Whether the weights have their memory: asleep from the first update on, which may be sent again."""
    paused_at = 0.0
    pause_seconds = 0.0
    """Seconds that sampling stopped for the last update."""

    async def pause(self) -> None:
        """Pause running requests and keep them; vLLM's defaults would abort them.

        With `recompute_kv` the cache is cleared too, so kept requests recompute their KV when they resume. An engine
        that sleeps gets the memory of its weights back, and nothing more.
        """
        if self.asleep:
            if not self.mapped:
                await self._await_vllm(self.llm.wake_up(tags=["weights"]))
            self.mapped = True
            return
        self.open.clear()
        await self._await_vllm(self.llm.pause_generation(mode="keep", clear_cache=self.config.rollout.recompute_kv))
        self.paused_at = time.perf_counter()

    async def resume(self) -> float:
        """Resume sampling, unless the engine sleeps; returns the seconds of the pause."""
        if not self.asleep:
            await self._await_vllm(self.llm.resume_generation())
            self.open.set()
        return time.perf_counter() - self.paused_at

    async def sleep(self) -> None:
        """Give the memory of weights and KV cache back. Requests are kept, and go on after an update and `wake`."""
        self.open.clear()
        self.paused_at, self.asleep, self.mapped = time.perf_counter(), True, False
        await self._await_vllm(self.llm.sleep(level=2, mode="keep"))

    async def wake(self) -> None:
        """After an update: get the memory of the KV cache back, and resume."""
        if self.asleep:
            assert not self.updating, "without its weights an engine cannot sample"
            await self._await_vllm(self.llm.wake_up(tags=["kv_cache"]))  # fully awake: vLLM resumes by itself
            self.asleep = False
            self.pause_seconds = await self.resume()
