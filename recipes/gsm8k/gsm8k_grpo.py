"""GSM8K with GRPO: the run of gsm8k_gspo.py with a ratio, a clip range and a correction weight for every token.

    python recipes/gsm8k/gsm8k_grpo.py

Hardware: 8 GPUs of 80 GB (4 engines, 4 learner ranks), and the hub or its local cache for model and data.
Not yet run on GPUs.
"""

from dataclasses import replace

from gsm8k_gspo import config as gspo

from rl.objectives import GRPO
from rl.objectives.corrections import TokenTIS
from trainer.launch import launch

config = replace(
    gspo,
    name="gsm8k_grpo",
    # The higher upper bound keeps rare tokens alive (DAPO, arXiv 2503.14476).
    objective=GRPO(clip_low=0.2, clip_high=0.28),
    correction=TokenTIS(cap=2.0),
)

if __name__ == "__main__":
    launch(config)
