"""The quickstart's run with GRPO in place of GSPO: what a variation of a recipe looks like.

python recipes/quickstart_grpo.py --seed 1
"""

from dataclasses import replace

from quickstart import config as gspo

from rl.objectives import GRPO
from trainer.launch import launch

config = replace(gspo, name="quickstart_grpo", objective=GRPO())

if __name__ == "__main__":
    launch(config)
