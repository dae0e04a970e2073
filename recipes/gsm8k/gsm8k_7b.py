"""GSM8K with GSPO for Qwen2.5-7B-Instruct: sharded gradients, Adam in the host's memory, layers computed twice.

    python recipes/gsm8k/gsm8k_7b.py --dry-run                         # what it needs of each GPU and the host
    python recipes/gsm8k/gsm8k_7b.py --trainer.lora.rank 32 --trainer.offload none --trainer.lr 2e-5   # adapters alone

Hardware: 8 GPUs of 80 GB (4 engines, 4 learner ranks), 160 GB of host memory, and the hub or its local cache for model
and data. Not yet run on GPUs.
"""

from dataclasses import replace

from gsm8k_gspo import config as gspo

from trainer.launch import launch

config = replace(
    gspo,
    name="gsm8k_7b",
    model="Qwen/Qwen2.5-7B-Instruct",
    trainer=replace(gspo.trainer, zero_stage=2, offload="optimizer", gradient_checkpointing=True),
)

if __name__ == "__main__":
    launch(config)
