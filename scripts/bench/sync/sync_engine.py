"""The engine of scripts/bench/sync/sync_bench.py: can sample without end, and can be updated tensor by tensor."""

import asyncio
import contextlib
from typing import Any

import torch

from rollout.engine import Engine
from rollout.worker import WorkerExtension


class PerTensor(WorkerExtension):
    """A worker that receives tensor by tensor, as in vLLM's own RL example: one call and one broadcast for each."""

    def join_per_tensor(self, port: int) -> None:
        from rollout.weights.channel import join

        self.group = join("127.0.0.1", port, 1, 2, 120)

    def begin_per_tensor(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.weight_transfer_engine.model)

    def receive_one(self, name: str, shape: list[int]) -> None:
        from rollout.weights.channel import broadcast

        tensor = broadcast(self.group, torch.empty(shape, dtype=torch.bfloat16))
        self.weight_transfer_engine.model.load_weights([(name, tensor)])

    def end_per_tensor(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        from rollout.head import forget_heads

        engine = self.weight_transfer_engine
        finalize_layerwise_reload(engine.model, engine.model_config)
        forget_heads(engine.model)


class Measured(Engine):
    """An engine with `PerTensor` workers and endless requests."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, overrides={"worker_extension_cls": "sync_engine.PerTensor"})
        self.served = 0
        self.endless: list[asyncio.Task[None]] = []

    async def rpc(self, method: str, *args: Any) -> None:
        """Call a worker's method."""
        await self.llm.collective_rpc(method, args=args)

    async def sample_on(self) -> None:
        """Start to sample, eight sequences at a time."""
        self.endless = [asyncio.create_task(self._sample_on()) for _ in range(2)]

    async def _sample_on(self) -> None:
        while True:
            await self.sample([1, 2, 3, 4 + self.served % 50], 4, None, max_tokens=64)
            self.served += 4

    async def sampled(self) -> dict[str, int]:
        """End the requests; returns how many were completed, and how many were aborted by an update."""
        aborted = (await self.counters())["aborted"]
        for request in self.endless:
            request.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self.endless)
        return {"served": self.served, "aborted": aborted}
