"""The multi-turn tasks of BFCL v4 with native tool calls: Qwen2.5-1.5B-Instruct on one GPU.

    .venv/bin/pip install --no-deps bfcl-eval==2026.3.23
    python recipes/environments/bfcl.py

Hardware: one GPU of 80 GB, and the hub or its local cache for the model. Not yet run on GPUs.
"""

from bfcl_tasks import Bfcl, tasks

from rl.config import Config, RolloutConfig, TrainerConfig
from rl.environments import Limits
from rl.filters import ZeroAdvantage
from rl.objectives import GSPO
from trainer.launch import launch

config = Config(
    name="bfcl",
    model="Qwen/Qwen2.5-1.5B-Instruct",
    data=tasks,
    env=Bfcl,
    # A user has up to 7 requests, and the benchmark allows 20 turns with calls for each.
    limits=Limits(turns=60),
    objective=GSPO(),
    steps=100,
    prompts_per_step=16,
    group_size=8,
    filters=(ZeroAdvantage(),),
    eval_every=20,
    long_prompts="drop",
    share_gpu=True,
    rollout=RolloutConfig(tool_parser="hermes", max_tokens=1024, max_model_len=24576, gpu_memory_utilization=0.4),
    trainer=TrainerConfig(lr=1e-6, gradient_checkpointing=True),
)

if __name__ == "__main__":
    launch(config)
