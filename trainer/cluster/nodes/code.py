"""What must reach other nodes besides our own sources: modules beside the recipe, and one revision of the model."""

import sys
from pathlib import Path

from rl import checkout


def beside_recipe() -> list[str]:
    """Files and folders of the user's modules that this process has imported; Ray ships each by its content."""
    found = set[str]()
    for name in {name.partition(".")[0] for name in sys.modules} - {*checkout.PACKAGES, "__main__", "__mp_main__"}:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and file.endswith(".py") and not checkout.is_installed(path := Path(file).resolve()):
            found.add(str(path.parent if path.name == "__init__.py" else path))
    return sorted(found)


def pinned(model: str) -> tuple[str, str]:
    """A model as every node shall take it, on the driver: a folder's full path, or a hub name and its commit."""
    if Path(model).is_dir():
        return str(Path(model).resolve()), ""
    from huggingface_hub import snapshot_download

    # The folder of a commit has its name, also where the hub is not reached and the cache answers.
    return model, Path(snapshot_download(model, allow_patterns=["config.json"])).name


def on_this_node(model: str, revision: str) -> str:
    """Folder of a pinned model here; it is fetched once per node, and others wait. Raises ValueError where it lacks."""
    if not revision:
        if not (Path(model) / "config.json").is_file():
            raise ValueError(
                f"the model {model} is not on this node: put it at the same path on every node, or on a file system "
                "that all of them mount"
            )
        return model
    from huggingface_hub import snapshot_download

    return snapshot_download(model, revision=revision, ignore_patterns=["*.gguf", "*.onnx", "*.h5", "original/*"])
