"""One learner rank on a fixed batch, for test_ranks.py: prints its metrics, and saves the weights it would send."""

import json
import sys

import torch

from rl.batch import collate, trajectory
from rl.config import Config, TrainerConfig
from rl.objectives import GRPO, PPO
from rl.types import Completion, Data, Prompt
from trainer.learner import Learner

rank, ranks, stage, port, objective, model, out = sys.argv[1:]
config = Config(
    name="ranks",
    model=model,
    data=lambda: Data(train=[]),
    reward=lambda reply: 0.0,
    objective={"grpo": GRPO(kl_coef=0.01, entropy_coef=0.01), "ppo": PPO()}[objective],
    dtype="float32",
    trainer=TrainerConfig(ranks=int(ranks), zero_stage=int(stage), lr=1e-3, micro_batch_tokens=200, minibatches=2),
)
learner = Learner(config, rank=int(rank), device="cpu", address="127.0.0.1", port=int(port), model=model)
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
batch = collate(rows)
history = [learner.step(batch) for _ in range(3)]
weights = {name: tensor.clone() for name, tensor in learner.weights}
if rank == "0":
    torch.save(weights, out)
    print("HISTORY " + json.dumps(history))
# A rank that leaves while another still reads from it breaks the other's connection.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
