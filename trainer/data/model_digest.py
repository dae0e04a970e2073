"""Are these the model's files of the run's start? A digest that reads little of large files."""

import hashlib

from trainer.model.files import WEIGHTS, base_folder

CONFIGS = ("config.json", "generation_config.json")
BLOCK, BLOCKS = 4096, 64
"""Bytes of each look into a weight file, and how many, evenly spread: a new version of a model changes them all."""


def model_digest(model: str) -> str:
    """Digest of a model's config and weights; empty where its folder is unknown on this machine."""
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
