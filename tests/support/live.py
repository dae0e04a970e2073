"""A real vLLM engine in a thread's event loop, and the trainer's end of its weight channel, in one process."""

import asyncio
import multiprocessing
import os
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rl.config import Config, RolloutConfig
from rl.types import Completion, Data
from rollout.settings import engine_env

for name, value in engine_env(device="cpu", backend="gloo", threads=1).items():
    os.environ.setdefault(name, value)


THREAD = os.environ.get("UNISON_CORE") == "thread"


def in_own_process(args: dict[str, Any], *, device: str) -> Any:
    """vLLM's engine with its core in a process of its own, forked from a server that has imported vLLM."""
    import vllm.v1.engine.utils
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    multiprocessing.set_forkserver_preload(["preload_vllm"])
    with patch.object(vllm.v1.engine.utils, "get_mp_context", lambda: multiprocessing.get_context("forkserver")):
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))


class Live:
    """An engine with blocking calls, its weights read from disk as version 0; it has a sender's control calls too."""

    def __init__(self, config: Config, version: int = 0, **overrides: Any) -> None:
        """vLLM's core is a process of its own: vLLM and DeepSpeed each want the one group of a process, and what a test
        plants in vLLM must not reach the trainer. With UNISON_CORE=thread it is a thread, as in an actor."""
        from rollout.engine import Engine

        self.config, self.closed = config, False
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

        async def make() -> Engine:
            options = {"load_format": "auto", **overrides}
            engine = Engine(
                config, device="cpu", backend="gloo", model=config.model, version=version, overrides=options
            )
            engine.generations = 0 if THREAD else 1
            await engine.start()
            return engine

        with nullcontext() if THREAD else patch("rollout.engine.async_llm", in_own_process):
            self.engine = self.wait(make())
        self.version = version

    def submit(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def wait(self, coroutine: Any) -> Any:
        return self.submit(coroutine).result(300)

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        return self.wait(self.engine.sample(*args, **kwargs))

    def keep_sampling(self, prompt: list[int], n: int, tokens: int | None = None) -> "Sampling":
        return Sampling(self, prompt, n, tokens)

    def init_weight_transfer_engine(self, info: dict) -> None:
        self.wait(self.engine.init_weight_transfer_engine(info))

    def stage_weights(self, version: int) -> None:
        self.wait(self.engine.stage_weights(version))

    def start_weight_update(self) -> None:
        self.wait(self.engine.start_weight_update())

    def update_weights(self, info: dict) -> None:
        self.wait(self.engine.update_weights(info))

    def finish_weight_update(self, version: str | None = None) -> None:
        self.wait(self.engine.finish_weight_update(self.version))

    def open_sender(self, weights: Any, timeout_s: float = 60) -> Any:
        from rollout.weights.sender import open_sender

        return open_sender(
            "gloo",
            weights=weights,
            expected=self.wait(self.engine.expected_weights([m.name for m in weights.metadata()])),
            client=self,
            rank=0,
            address="127.0.0.1",
            world_size=2,
            timeout_s=timeout_s,
        )

    def update(self, sender: Any, version: int) -> None:
        self.version = version
        sender.send_weights()

    def close(self) -> None:
        """End the engine; a second call does nothing."""
        if self.closed:
            return
        self.closed = True
        self.wait(self.engine.close())
        self.loop.call_soon_threadsafe(self.loop.stop)


class Sampling:
    """Two lots of n requests, by turns and out of step, until the result is asked for: some are always under way.

    `tokens` is the length of each; the run's by default. This returns once the second lot has sampled some of its own.
    """

    def __init__(self, live: Live, prompt: list[int], n: int, tokens: int | None = None) -> None:
        self.on = True
        self.under_way = threading.Event()
        self.future = live.submit(self._both(live.engine, prompt, n, tokens or live.config.rollout.max_tokens))
        while not self.under_way.wait(0.1):
            if self.future.done():
                self.future.result()

    def result(self, timeout_s: float) -> list[Completion]:
        """All that was sampled; raises what ended the sampling, as `EngineLost`."""
        self.on = False
        return self.future.result(timeout_s)

    async def _both(self, engine: Any, prompt: list[int], n: int, tokens: int) -> list[Completion]:
        one, other = await asyncio.gather(
            self._lots(engine, prompt, n, tokens // 4, tokens, seed=100),
            self._lots(engine, prompt, n, tokens, tokens, seed=200),
        )
        return one + other

    async def _lots(self, engine: Any, prompt: list[int], n: int, first: int, rest: int, seed: int) -> list[Completion]:
        done = await engine.sample(prompt, n, seed, max_tokens=first)
        self.under_way.set()
        while self.on:
            seed += 1
            done += await engine.sample(prompt, n, seed, max_tokens=rest)
        return done


def engine_config(model: Path, **changes: Any) -> Config:
    """A config for one engine; `rollout` may be among the changes."""
    config = Config(
        name="test",
        model=str(model),
        data=lambda: Data(train=[]),
        reward=lambda reply: 0.0,
        dtype="float32",
        rollout=RolloutConfig(max_tokens=200, max_model_len=320, max_num_seqs=32, kv_cache_gib=0.25),
    )
    return replace(config, **changes)
