"""An engine whose KV cache has a fixed size, so that several can start at the same time on one GPU."""

from typing import Any

from rollout.engine import Engine

FIXED: dict[str, Any] = {"kv_cache_memory_bytes": 2**30, "gpu_memory_utilization": 0.05}


class FixedCacheEngine(Engine):
    """`Engine` with `FIXED` among its arguments; on CPU it is `Engine`."""

    def __init__(self, config: Any, *, device: str, overrides: dict[str, Any] | None = None, **how: Any) -> None:
        fixed = FIXED if device == "cuda" else {}
        super().__init__(config, device=device, overrides=fixed | (overrides or {}), **how)
