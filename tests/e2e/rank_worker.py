"""One learner rank on a fixed batch, for test_ranks.py: prints its metrics, and saves the weights it would send.

Its state goes to `folder` before the last step; `resume` makes that last step alone, from the state in `folder`, and
writes the state that it found back as "again".
"""

import json
import sys
from pathlib import Path

import torch

from rl.batch import collate, trajectory
from rl.config import Config, Lora, TrainerConfig
from rl.objectives import GRPO, PPO
from rl.types import Completion, Data, Prompt
from trainer.learner.learner import Learner

rank, ranks, stage, dtype, port, objective, model, out, folder, action, more = sys.argv[1:]
config = Config(
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
        ranks=int(ranks),
        zero_stage=int(stage),
        lr=1e-3,
        value_lr=1e-2 if objective == "ppo" else None,
        lr_schedule="cosine",
        weight_decay=0.01,
        micro_batch_tokens=200,
        minibatches=2,
        sequence_parallel=2 if more == "sequence" else 1,
        offload="optimizer" if more == "offload" else "none",
        lora=Lora(rank=4, alpha=8.0) if more == "lora" else Lora(),
    ),
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
history = []
if action == "resume":
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
history = [{name: x for name, x in step.items() if not name.startswith("memory/")} for step in history]
if rank == "0":
    torch.save(weights, out)
    print("HISTORY " + json.dumps(history))
# A rank that leaves while another still reads from it breaks the other's connection.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
