"""How vLLM V1 samples and takes new weights. The only package that touches vLLM."""

import os
import sys
from typing import Any, cast

if (os.environ.get("TORCHDYNAMO_DISABLE"), os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")) == ("1", "0"):
    # An engine on a CPU (`rollout.settings.engine_env`): nothing is compiled. vLLM imports torch's compiler for
    # 1 s, to tell it the names of its kernels, and does without where there is none.
    sys.modules.setdefault("torch._inductor.lowering", cast(Any, None))
