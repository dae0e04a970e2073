"""What is a run made of, besides its settings? Digests, by which a resumed run notices what changed."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from rl.config import Config
from rl.data import Eval, Train, sized
from rl.loop.estimates import NO_MEANS, Means
from rl.types import Prompt
from trainer.model.files import WEIGHTS, base_folder
from trainer.runs.own_code import code_digests
from trainer.runs.settings import plain

CONFIGS = ("config.json", "generation_config.json")
BLOCK, BLOCKS = 4096, 64
"""Bytes of each look into a weight file, and how many, evenly spread: a new version of a model changes them all."""


def fingerprint(
    config: Config,
    train: list[Prompt],
    evals: Mapping[str, list[Prompt]],
    source: Train | None,
    sets: Mapping[str, Eval],
    means: Means = NO_MEANS,
) -> dict[str, Any]:
    """Digests of training data, held-out sets, code and model files.

    Of a training set that is read as needed (`source`) they cover the examples that are read at every start.
    """
    whole = train if source is None else source
    return {
        "size": len(whole) if sized(whole) else None,  # pyright: ignore[reportArgumentType]
        "texts": digest_of([p.given, *p.tools] if p.tools else p.given for p in train),
        "answers": digest_of(prompt.task for prompt in train),
        "evals": {name: digest_of([p.token_ids, p.task] for p in prompts) for name, prompts in evals.items()},
        "means": {name: dict(weights) for name, weights in means.items()},
        "code": code_digests(config, sets),
        "model": model_digest(config.model),
    }


def digest_of(values: Iterable[Any]) -> str:
    """Digest of values of any kind, equal in every process."""
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        digest.update(json.dumps(plain(value, -100, most=float("inf")), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def model_digest(model: str) -> str:
    """Digest of a model's config and weights, of which it reads little; empty where its folder is unknown here."""
    folder = base_folder(model)
    if folder is None:
        return ""
    digest, found = hashlib.blake2b(digest_size=16), False
    for path in sorted(folder.iterdir()):
        if path.name in CONFIGS:
            found = True
            digest.update(path.name.encode() + path.read_bytes())
        elif path.name.endswith(WEIGHTS):
            found, size = True, path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for number in range(BLOCKS):
                    file.seek(number * max(size - BLOCK, 0) // max(BLOCKS - 1, 1))
                    digest.update(file.read(BLOCK))
    return digest.hexdigest() if found else ""
