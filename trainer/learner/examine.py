"""The learner's side of the doctor: its settings, its weights and its layers, next to those of an engine."""

from typing import Any

import torch

from rl.parity.architecture import architecture
from rl.parity.body.fits import LAYER_ERROR
from rl.parity.evidence import LayerError, PartError
from rl.sampling.forbidden import Forbidden
from rl.weights import digest
from trainer.learner.rank import Rank, whole_rows
from trainer.learner.traced import layers
from trainer.learner.traced.records import read
from trainer.learner.traced.replay import replay
from trainer.learner.weights import LearnerWeights


def describe(rank: Rank) -> dict[str, Any]:
    """The settings that the learner computes log-probabilities with, read from the model itself where possible."""
    hf, head = rank.policy.hf, rank.head
    return {
        "dtype": str(next(hf.get_decoder().parameters()).dtype).removeprefix("torch."),
        "head_dtype": "float32" if head.fp32 else str(head.weight.dtype).removeprefix("torch."),
        "tied": bool(hf.config.get_text_config().tie_word_embeddings),
        "architecture": architecture(hf.config.get_text_config().to_dict()),
        "temperature": rank.config.temperature,
        "truncation": rank.config.rollout.truncation,
        "forbidden": (rank.policy.forbidden or Forbidden()).facts(),
    }


def digests(weights: LearnerWeights) -> dict[str, str]:
    """Digest of every current weight by name. A collective over all ranks under ZeRO-3."""
    return {name: digest(tensor) for name, tensor in weights}


@torch.no_grad()
def compare_layers(rank: Rank, trace: dict[str, Any]) -> tuple[list[LayerError], list[PartError], list[str]]:
    """Errors of an engine's layers and between them, and the layers that the learner lacks.

    See `trainer.learner.traced.layers` and `trainer.learner.traced.replay`. A collective over all ranks.
    """
    dtype, hf = rank.config.dtype, rank.policy.hf
    seen = read(trace, hf.base_model_prefix)
    with whole_rows(rank):
        between, places = replay(rank.engine, hf, seen, LAYER_ERROR[dtype])
    own, unknown = layers.layer_errors(hf, rank.head, seen, places, dtype=dtype, sharded=rank.weights.sharded)
    return own, between, unknown
