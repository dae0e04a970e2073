"""Five steps at a fixed seed: what do loss and gradient norm come to on this kind of machine, bit for bit?

    .venv/bin/python tests/support/curve.py          # print them
    .venv/bin/python tests/support/curve.py --add    # store them in tests/data/curve.json for machines of this kind

Add a kind from a commit whose numbers are trusted, and commit the file. After a change that is meant to change numbers,
delete the other kinds: their numbers are no longer true.
"""

import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from models import make_model
from rl.batch import collate, trajectory
from rl.config import Config, RolloutConfig, TrainerConfig
from rl.objectives import GSPO, PPO, Objective
from rl.types import Batch, Completion, Data, Prompt
from trainer.learner.learner import Learner

STORED = Path(__file__).resolve().parent.parent / "data" / "curve.json"
STEPS = 5
METRICS = ("actor/loss", "actor/grad_norm")
OBJECTIVES: dict[str, Objective] = {
    # Wider clips than the paper's: two optimizer steps of this size would clip everything.
    "GSPO": GSPO(clip_low=0.03, clip_high=0.04, kl_coef=0.01, entropy_coef=0.01),
    "PPO": PPO(),
}


def kind() -> dict[str, str]:
    """What decides the last bits of a sum: the processor's vendor, the vector instructions torch uses, and torch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    vendors = [line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")]
    return {
        "vendor": vendors[0] if vendors else platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def batch_of(step: int) -> Batch:
    """4 prompts of 4 replies each, up to 24 tokens long, with rewards and rollout log-probabilities out of the air."""
    generator, rows = torch.Generator().manual_seed(step), []
    for ordinal in range(4):
        ids = torch.randint(3, 90, (4 + ordinal,), generator=generator).tolist()
        prompt = Prompt(ordinal=ordinal, token_ids=ids, task={})
        for sample in range(4):
            tokens = torch.randint(3, 90, (3 + 7 * sample,), generator=generator).tolist()
            logprobs = (-4.6 + 0.1 * torch.randn(len(tokens), generator=generator)).tolist()
            reply = Completion(token_ids=tokens, logprobs=logprobs, versions=[step] * len(tokens), finish_reason="stop")
            rows.append(trajectory(prompt, reply, float(torch.rand(1, generator=generator)), {}))
    return collate(rows)


def curve(objective: Objective, model: str) -> dict[str, list[float]]:
    """Each of `METRICS` by step, from one learner rank that shares the process's group."""
    config = Config(
        name="curve",
        model=model,
        data=lambda: Data(train=[]),
        reward=lambda reply: 0.0,
        objective=objective,
        old_logprobs="recompute",
        dtype="float32",
        steps=STEPS,
        rollout=RolloutConfig(max_tokens=24),
        trainer=TrainerConfig(
            lr=1e-3, value_lr=1e-2 if objective.uses_values else None, minibatches=2, micro_batch_tokens=128
        ),
    )
    learner = Learner(config, rank=0, device="cpu", address="127.0.0.1", port=0, model=model)
    history = [learner.step(batch_of(step)) for step in range(STEPS)]
    return {name: [metrics[name] for metrics in history] for name in METRICS}


def curves() -> dict[str, Any]:
    """The curves of `OBJECTIVES`. For a fresh process: it joins a process group and sets environment variables."""
    import trainer.learner.learner as module

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_model(Path(folder), tied=True, peak=1.0))
        for name, objective in OBJECTIVES.items():
            found[name] = curve(objective, model)
            module.join_group = lambda *_: None  # the learners of one process share its group
    return found


def main() -> None:
    measured = {**kind(), "curves": curves()}
    if "--add" in sys.argv:
        stored = json.loads(STORED.read_text()) if STORED.exists() else []
        others = [machine for machine in stored if any(machine[name] != value for name, value in kind().items())]
        STORED.write_text(json.dumps([*others, measured], indent=1) + "\n")
    print("CURVES " + json.dumps(measured))


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    main()
