"""The recipe of BFCL for a tiny random model on CPU: short tasks, one step."""

from dataclasses import replace
from functools import partial

from bfcl import config as bfcl
from bfcl_tasks import KINDS, Bfcl, examples

from rl.config import RolloutConfig, TrainerConfig
from rl.environments import Limits
from rl.types import Data
from trainer.launch import launch


class Tiny(Bfcl):
    """Also pays letters, because a random model does nothing that the benchmark pays."""

    def reward(self, episode):
        return {"verdict": super().reward(episode), "letters": sum(c.isalpha() for c in episode.turns[0].text) / 100}


def shortest(count: int) -> Data:
    """The tasks with the fewest tools."""
    kinds = {kind: sorted(examples(kind), key=lambda e: len(str(e.tools)))[: count + 1] for kind in KINDS}
    evals = {kind: found[:1] for kind, found in kinds.items()}
    return Data(train=[each for found in kinds.values() for each in found[1:]], evals=evals)


config = replace(
    bfcl,
    name="echo",
    data=partial(shortest, 1),
    env=Tiny,
    limits=Limits(turns=3),
    steps=1,
    prompts_per_step=2,
    group_size=2,
    filters=(),
    eval_every=0,
    long_prompts="refuse",
    dtype="float32",
    device="cpu",
    share_gpu=None,
    save_every=0,
    save_final=False,
    rollout=RolloutConfig(tool_parser="hermes", max_tokens=16, max_model_len=8192, max_num_seqs=4, kv_cache_gib=0.5),
    trainer=TrainerConfig(lr=1e-4, zero_stage=0, micro_batch_tokens=8192),
)

if __name__ == "__main__":
    launch(config)
