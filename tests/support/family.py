"""One model family through the whole framework: trainer, engine, weight update, adapters, export, reload."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from live import Live, engine_config
from pair import make_learner
from rl.batch import collate, trajectory
from rl.config import Config, Lora, TrainerConfig
from rl.types import Batch, Completion, Prompt
from trainer.learner.learner import Learner
from trainer.model.files import copy_companions
from trainer.prompts import load_tokenizer

PROMPTS = [list(range(10, 60)), list(range(40, 62))]
"""Longer than the windows of the families that have one."""


def family_gaps(model: Path, folder: Path, live: Callable[..., Live], *, peak: float = 1.0) -> dict[str, Any]:
    """Largest |d| in nats for each step of a family's way, and whether its rows are packed. T = 0.7, fp32."""
    config = engine_config(model, temperature=0.7)
    learner = make_learner(config)
    engine = live(config, version=-1, load_format="dummy")
    found: dict[str, Any] = {"rows": "packed" if learner.parts.policy.packs else "padded"}
    found["trainer"] = trainer_gap(model, learner)
    sender = engine.open_sender(learner.weights)
    engine.update(sender, 0)
    found["engine"] = engine_gap(engine, learner)
    learner.perturb(4)
    engine.update(sender, 1)
    found["update"] = engine_gap(engine, learner)
    found["export"] = export_gap(learner, folder / "exported")
    reloaded = live(replace(config, model=str(folder / "exported")))
    found["reload"] = engine_gap(reloaded, learner)
    reloaded.close()
    learner.perturb(4)
    found["lora"] = adapter_gap(config, engine)
    engine.close()
    return found


def adapter_gap(config: Config, engine: Live) -> float:
    """Engine against trainer after an update with random adapters, merged."""
    learner = make_learner(replace(config, trainer=TrainerConfig(lora=Lora(rank=4))))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for layer in learner.weights.adapted.values():
            layer.lora_B["default"].weight.normal_(std=0.05, generator=generator)
    engine.update(engine.open_sender(learner.weights), 2)
    return engine_gap(engine, learner)


def sampled(engine: Live) -> Batch:
    """Two groups of an engine's completions."""
    rows = []
    for i, ids in enumerate(PROMPTS):
        completions: list[Completion] = engine.sample(ids, 4, seed=1 + i, max_tokens=40)
        rows += [trajectory(Prompt(ordinal=i, token_ids=ids, task={}), c, 0.0, {}) for c in completions]
    return collate(rows)


def engine_gap(engine: Live, learner: Learner) -> float:
    """Engine against trainer on what the engine samples."""
    batch = sampled(engine)
    assert int(batch.mask.sum()) > 100
    assert batch.rollout_logprobs[batch.mask].mean() < -0.3, "a policy that is almost certain shows no difference"
    return float((learner.logprobs(batch) - batch.rollout_logprobs)[batch.mask].abs().max())


def random_batch(vocabulary: int) -> Batch:
    """Two random sequences; the second half of each counts as sampled."""
    ids = torch.randint(5, vocabulary, (2, 48), generator=torch.Generator().manual_seed(1)).tolist()
    completions = [
        Completion(token_ids=row[24:], logprobs=[0.0] * 24, versions=[0] * 24, finish_reason="length") for row in ids
    ]
    return collate(
        [
            trajectory(Prompt(ordinal=i, token_ids=row[:24], task={}), c, 0.0, {})
            for i, (row, c) in enumerate(zip(ids, completions, strict=True))
        ]
    )


def trainer_gap(model: Path, learner: Learner) -> float:
    """Trainer against transformers' own logits of the model in a folder."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    batch = random_batch(min(hf.config.vocab_size, 100))
    with torch.no_grad():
        logits = hf(batch.input_ids[:, :-1]).logits.float()
    own = torch.log_softmax(logits / learner.config.temperature, -1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    return float((learner.logprobs(batch) - own)[batch.mask].abs().max())


def export_gap(learner: Learner, folder: Path) -> float:
    """Trainer against transformers' own logits of the exported model."""
    learner.export(str(folder))
    copy_companions(learner.config.model, load_tokenizer(learner.config.model), folder)
    return trainer_gap(folder, learner)
