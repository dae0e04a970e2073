"""vLLM's engine core, stepped by a thread of the process that asks it; no second process.

`AsyncLLM` always starts its core in a process of its own, and every step's outputs are encoded, sent and decoded there.
On a CPU that takes the cores from the model's threads: two thirds of the speed are left, and vLLM is imported twice. On
a GPU the model needs no core, and a separate process is right.
"""

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from vllm import AsyncEngineArgs
from vllm.config import VllmConfig
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore, EngineCoreProc, EngineShutdownState
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient, _process_utility_output
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor

Output = tuple[int, EngineCoreOutputs] | bytes
"""A client's number and what it gets, or `ENGINE_CORE_DEAD`."""
TOGETHER_S = 0.003
"""Seconds without a further request after which an idle core begins: a group comes as many requests, and a step with
the first of them alone takes as long as one with all."""
READ_S = 0.02
"""Most seconds that the next step waits for the event loop to read the last one's outputs. Both need Python and the
cores, so side by side they take longer than in turn; a loop with other work may not stop the model."""


def async_llm(args: dict[str, Any], *, device: str) -> AsyncLLM:
    """vLLM's engine with these `AsyncEngineArgs`. On "cpu" its core is a thread of this process."""
    asked = AsyncEngineArgs(**args)
    if device != "cpu":
        return AsyncLLM.from_engine_args(asked)
    config = asked.create_engine_config(UsageContext.ENGINE_CONTEXT)
    client = CoreClient(config, log_stats=not asked.disable_log_stats)
    with patch.object(EngineCoreClient, "make_async_mp_client", client.built):
        # The tokenizer is read while the core builds the model.
        return AsyncLLM.from_vllm_config(config, disable_log_stats=asked.disable_log_stats)


class Core(EngineCoreProc):
    """vLLM's core with its queues alone: no sockets, and so no threads that serve them."""

    def __init__(self, vllm_config: Any, executor_class: type[Executor], log_stats: bool, outputs: "Outputs") -> None:
        self.input_queue = queue.Queue()
        self.output_queue = outputs
        self.engine_index = 0
        self.engines_running = self.publish_dp_lb_stats = self.has_coordinator = self.enable_fault_tolerance = False
        self.shutdown_state = EngineShutdownState.RUNNING
        self.process_input_queue_block = True
        self.tensor_ipc_receiver = None
        EngineCore.__init__(
            self,
            vllm_config,
            executor_class,
            log_stats,
            lambda: self.input_queue.put_nowait((EngineCoreRequestType.EXECUTOR_FAILED, b"")),
        )

    def _process_input_queue(self) -> None:
        """Take what was asked; of a group that arrives at an idle core, all of it before the first step."""
        idle = not self.has_work()
        super()._process_input_queue()
        while idle:
            time.sleep(TOGETHER_S)
            idle = not self.input_queue.empty()
            super()._process_input_queue()

    def _process_engine_step(self) -> bool:
        """A step, and then the reading of what it gave: both need the interpreter and the cores."""
        executed = super()._process_engine_step()
        self.output_queue.read.wait(READ_S)
        return executed


class Outputs(queue.Queue[Any]):
    """The core's queue of outputs, which hands each to the client at once."""

    def __init__(self, deliver: Callable[[Output], None]) -> None:
        super().__init__()
        self.deliver = deliver
        self.read = threading.Event()
        """Set while the event loop has nothing left to read."""
        self.read.set()

    def put_nowait(self, item: Any) -> None:
        self.read.clear()
        self.deliver(item)


class CoreClient(AsyncMPClient):
    """What `AsyncLLM` asks its core through: the same calls, without a socket."""

    def __init__(self, vllm_config: VllmConfig, *, log_stats: bool) -> None:
        self.vllm_config = vllm_config
        self.client_index = 0
        self.core_engine, self.core_engines, self.engine_ranks_managed = b"", [b""], [0]
        self.resources: Any = SimpleNamespace(engine_dead=False)
        """Whether the core still runs, where vLLM looks for it."""
        self.utility_results: dict[int, Any] = {}
        self.calls = itertools.count()
        self.outputs_queue = asyncio.Queue()
        self.arrived = queue.SimpleQueue[Output]()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.building = Future[Core]()
        self.outputs = Outputs(self._deliver)
        # OpenMP's threads belong to the thread that made them: what builds the model also runs it.
        make = (vllm_config, Executor.get_class(vllm_config), log_stats, self.outputs)
        self.thread = threading.Thread(target=_run, args=(make, self.building), daemon=True, name="vLLM's core")
        self.thread.start()

    def built(self, *_: Any, **__: Any) -> "CoreClient":
        """This client, once its core has a model. Raises what building it raises."""
        self.core = self.building.result()
        return self

    def _deliver(self, output: Output) -> None:
        """Called by the core's thread."""
        self.arrived.put(output)
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        """Hand what has arrived to those who wait for it. Runs in the event loop."""
        while not self.arrived.empty():
            output = self.arrived.get()
            if isinstance(output, bytes):
                self.resources.engine_dead = True
                self.outputs_queue.put_nowait(EngineDeadError())
                for waiting in self.utility_results.values():
                    if not waiting.done():
                        waiting.set_exception(EngineDeadError())
            elif (result := output[1].utility_output) is not None:
                _process_utility_output(result, self.utility_results)
            elif output[1].outputs or output[1].scheduler_stats:
                self.outputs_queue.put_nowait(output[1])
        if self.outputs_queue.empty():
            self.outputs.read.set()

    async def get_output_async(self) -> EngineCoreOutputs:
        """What the core gave next. Whoever asks has read everything before it."""
        if self.outputs_queue.empty():
            self.outputs.read.set()
        return await super().get_output_async()

    def _ensure_output_queue_task(self) -> None:
        if self.loop is None:
            self.loop = asyncio.get_running_loop()
            self._take()

    def _put(self, kind: EngineCoreRequestType, request: Any) -> None:
        self.ensure_alive()
        self._ensure_output_queue_task()
        self.core.input_queue.put_nowait((kind, request))

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self._put(EngineCoreRequestType.ADD, self.core.preprocess_add_request(request))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        if request_ids and not self.resources.engine_dead:
            self.core.aborts_queue.put_nowait(request_ids)
            self._put(EngineCoreRequestType.ABORT, request_ids)

    async def _call_utility_async(self, method: str, *args: Any, engine: Any) -> Any:
        call, result = next(self.calls), asyncio.get_running_loop().create_future()
        self.utility_results[call] = result
        self._put(EngineCoreRequestType.UTILITY, (0, call, method, args))
        return await result

    def shutdown(self, timeout: float | None = None) -> None:
        """End the core's thread; what it still samples is dropped."""
        if not self.resources.engine_dead:
            self.resources.engine_dead = True
            self.core.shutdown_state = EngineShutdownState.REQUESTED
            self.core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))
        self.thread.join(timeout)


def _run(make: tuple[Any, ...], started: "Future[Core]") -> None:
    """The core's thread."""
    try:
        core = Core(*make)
    except BaseException as error:
        started.set_exception(error)
        return
    started.set_result(core)
    try:
        core.run_busy_loop()
    except SystemExit:
        pass
    except BaseException:
        make[-1].put_nowait(EngineCoreProc.ENGINE_CORE_DEAD)
        raise
    finally:
        core.shutdown()
