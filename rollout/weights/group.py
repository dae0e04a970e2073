"""Can this NCCL group move anything? Where NCCL is switched off, vLLM does nothing and reports success."""

from typing import Any


def check_usable(group: Any) -> None:
    """Raise RuntimeError if a `PyNcclCommunicator` was switched off, did not load, or was aborted.

    Every broadcast of such a group returns at once, and the receivers would load memory that nobody wrote.
    """
    if not group.available or group.disabled:
        raise RuntimeError(
            "NCCL is not available to vLLM in this process, so weights cannot travel: unset VLLM_DISABLE_PYNCCL, and "
            "see that libnccl loads (VLLM_NCCL_SO_PATH names another library)"
        )
