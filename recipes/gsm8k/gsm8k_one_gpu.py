"""GSM8K with GSPO on one GPU: Qwen2.5-0.5B-Instruct, engine and learner side by side, weights by CUDA IPC.

    python recipes/gsm8k/gsm8k_one_gpu.py

Hardware: one GPU of 40 GB or more, and the hub or its local cache for model and data. Not yet run on GPUs.
"""

from dataclasses import replace

from gsm8k_gspo import config as gspo

from rl.objectives.corrections import Uncorrected
from trainer.launch import launch

config = replace(
    gspo,
    name="gsm8k_one_gpu",
    model="Qwen/Qwen2.5-0.5B-Instruct",
    share_gpu=True,
    # Engine and learner take turns on the one GPU: nothing to overlap, so every sample is of the newest weights.
    max_staleness=0,
    correction=Uncorrected(),
    steps=230,  # one epoch
    prompts_per_step=32,
    rollout=replace(gspo.rollout, engines=1, max_tokens=512, max_model_len=1024, gpu_memory_utilization=0.4),
    trainer=replace(gspo.trainer, ranks=1, zero_stage=1, gradient_checkpointing=True),
)

if __name__ == "__main__":
    launch(config)
