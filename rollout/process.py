"""Start vLLM's own process without a second import of vLLM: a fork server imports it while the actor does.

vLLM spawns its engine-core process, which then imports vLLM again before it can do anything: half of an engine's start
on CPU. Here that process is forked from a clean one that has imported vLLM and done nothing else (no Ray, no threads
of its own), at the actor's start and again whenever an engine must be replaced.
"""

import multiprocessing
from multiprocessing import forkserver

PRELOADED = "rollout.preload"


def start() -> None:
    """Let a fork server import vLLM from now on. It inherits this process's environment, and ends with it."""
    multiprocessing.set_forkserver_preload([PRELOADED])
    forkserver.ensure_running()


def use() -> None:
    """Have vLLM fork its process from the server, started now if it was not. For CPU: GPUs keep vLLM's own way."""
    start()
    import vllm.v1.engine.utils

    vllm.v1.engine.utils.get_mp_context = lambda: multiprocessing.get_context("forkserver")
