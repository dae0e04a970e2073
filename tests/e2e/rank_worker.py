"""One learner rank, for test_ranks.py: builds a learner for every request on stdin, and answers on stdout.

The process group is made once. A learner takes nine steps on a fixed batch, writes its state to `folder`, and takes one
more. With `resume` it takes that last step alone, from the state in `folder`, and writes the state that it found back
as "again". Rank 0 saves the weights of before and after the last step to `out`.
"""

import gc
import json
import sys
import traceback
from pathlib import Path
from unittest.mock import patch

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rl.batch import collate, trajectory
from rl.config import Config, Deadlines, Lora, TrainerConfig
from rl.objectives import GRPO, PPO
from rl.types import Batch, Completion, Data, Prompt
from trainer.learner.learner import Learner, join_group


def config_of(
    ranks: int, model: str, objective: str, stage: int, dtype: str, more: str = "", **_: str | bool
) -> Config:
    return Config(
        name="ranks",
        model=model,
        data=lambda: Data(train=[]),
        reward=lambda reply: 0.0,
        objective={
            "grpo": GRPO(kl_coef=0.01, kl_target=1e-6, entropy_coef=0.01, entropy_target=99.0),
            "ppo": PPO(critic_warmup=2),
        }[objective],
        dtype=dtype,
        steps=12,
        trainer=TrainerConfig(
            ranks=ranks,
            zero_stage=stage,
            lr=1e-3,
            value_lr=1e-2 if objective == "ppo" else None,
            lr_schedule="cosine",
            weight_decay=0.01,
            micro_batch_tokens=40 if more == "small" else 200,
            minibatches=2,
            sequence_parallel=2 if more == "sequence" else 1,
            offload="optimizer" if more == "offload" else "none",
            lora=Lora(rank=4, alpha=8.0) if more == "lora" else Lora(),
        ),
    )


def fixed_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for ordinal in range(5):
        prompt = Prompt(
            ordinal=ordinal, token_ids=torch.randint(3, 90, (4 + ordinal,), generator=generator).tolist(), task={}
        )
        for sample in range(4):
            tokens = torch.randint(3, 90, (3 + 7 * sample,), generator=generator).tolist()
            reply = Completion(
                token_ids=tokens, logprobs=[-4.0] * len(tokens), versions=[0] * len(tokens), finish_reason="stop"
            )
            rows.append(trajectory(prompt, reply, float(torch.rand(1, generator=generator)), {}))
    return collate(rows)


def train(learner: Learner, *, out: str, folder: str, resume: bool) -> list[dict[str, float]]:
    """Metrics by step."""
    batch, history = fixed_batch(), []
    if resume:
        torch.rand(1000)  # a generator that is not where it was
        learner.load_state(folder)
        again = Path(out).with_suffix(".again")
        again.mkdir(exist_ok=True)
        learner.save_state(str(again))
    else:
        history = [learner.step(batch) for _ in range(9)]
        torch.rand(17)
        Path(folder).mkdir(exist_ok=True)
        learner.save_state(folder)
    before = {f"before/{name}": tensor.clone() for name, tensor in learner.weights}
    history.append(learner.step(batch))
    weights = before | {name: tensor.clone() for name, tensor in learner.weights} | {"random": torch.rand(4)}
    if learner.rank == 0:
        torch.save(weights, out)
    return [{name: x for name, x in step.items() if not name.startswith("memory/")} for step in history]


def answer(rank: int, request: dict) -> dict:
    config = config_of(**request)
    learner = None
    try:
        with patch("trainer.learner.learner.join_group"):
            learner = Learner(config, rank=rank, device="cpu", address="", port=0, model=config.model)
        history = train(learner, out=request["out"], folder=request["folder"], resume=request["resume"])
        return {"history": history}
    except Exception:
        return {"error": traceback.format_exc()}
    finally:
        # The next learner must not see that this one was sharded.
        unset_hf_deepspeed_config()
        if learner is not None:
            learner.parts.engine.destroy()
        del learner
        gc.collect()


if __name__ == "__main__":
    rank, ranks, port, listener = map(int, sys.argv[1:])
    join_group(rank, ranks, "cpu", "127.0.0.1", port, Deadlines(start_s=300.0), listener if rank == 0 else None)
    for line in sys.stdin:
        print("ANSWER " + json.dumps(answer(rank, {"ranks": ranks, **json.loads(line)})), flush=True)
