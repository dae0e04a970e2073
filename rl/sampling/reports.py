"""Which engines report what they did: the tokens that truncation kept, and the experts of each token?"""

import os


def engine_reports(device: str) -> bool:
    """Whether vLLM runs its Model Runner V2 on a device ("cpu" or "cuda"); only that one reports.

    It is the GPU's. A CPU has it only where vLLM's own variable asks for it, because it needs a Triton for that CPU.
    """
    return device == "cuda" or os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
