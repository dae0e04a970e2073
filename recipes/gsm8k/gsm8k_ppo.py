"""GSM8K with PPO: the run of gsm8k_gspo.py with a critic as the baseline, so that one sample per problem is enough.

    python recipes/gsm8k/gsm8k_ppo.py

Hardware: 8 GPUs of 80 GB (4 engines, 4 learner ranks), and the hub or its local cache for model and data.
Not yet run on GPUs.
"""

from dataclasses import replace

from gsm8k_gspo import config as gspo

from rl.objectives import PPO
from rl.objectives.corrections import TokenTIS
from trainer.launch import launch

config = replace(
    gspo,
    name="gsm8k_ppo",
    # lam=1: the only reward is at the end, and 0.95 would fade it to nothing within a hundred tokens.
    objective=PPO(lam=1.0, critic_warmup=80),
    correction=TokenTIS(cap=2.0),
    steps=150,  # ten epochs
    prompts_per_step=512,
    group_size=1,
    # The critic starts from zero: it has ten steps (of two passes over four minibatches) alone, and its own lr.
    trainer=replace(gspo.trainer, epochs=2, value_lr=1e-5),
)

if __name__ == "__main__":
    launch(config)
