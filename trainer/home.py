"""Where may libraries keep their caches, and what is the user called? Answers for processes without a home or a name.

Containers run with a user id that has no name, with no home, or with one that cannot be written. Then libraries of ours
fail in the middle of a run: matplotlib, Triton, torch, vLLM and W&B each write to a cache of their own.
"""

import getpass
import os
import tempfile
from pathlib import Path

CACHE, CONFIG, DATA = "~/.cache", "~/.config", "~/.local/share"
FOLDERS = {
    "MPLCONFIGDIR": f"{CONFIG}/matplotlib",
    "TORCH_EXTENSIONS_DIR": f"{CACHE}/torch_extensions",
    "TRITON_CACHE_DIR": "~/.triton/cache",
    "VLLM_CACHE_ROOT": f"{CACHE}/vllm",
    "VLLM_CONFIG_ROOT": f"{CONFIG}/vllm",
    "WANDB_CACHE_DIR": f"{CACHE}/wandb",
    "WANDB_CONFIG_DIR": f"{CONFIG}/wandb",
    "WANDB_DATA_DIR": f"{DATA}/wandb",
    "HF_MODULES_CACHE": f"{CACHE}/huggingface/modules",
}
"""Variable and default of each folder that a library writes to. Downloaded models are not among them: they are read
where they are."""
XDG = {CACHE: "XDG_CACHE_HOME", CONFIG: "XDG_CONFIG_HOME", DATA: "XDG_DATA_HOME"}


def prepare_home() -> str:
    """Set environment variables, which actors inherit, for what this process lacks. Call it before other imports.

    Returns a sentence for the user, or "" where nothing was lacking.
    """
    notes: list[str] = []
    try:
        getpass.getuser()
    except (KeyError, OSError):  # KeyError: before Python 3.13
        os.environ["USER"] = os.environ["LOGNAME"] = f"uid{os.getuid()}"
    if "HOME" not in os.environ and os.path.expanduser("~") == "~":
        os.environ["HOME"] = str(_scratch())
        notes.append(f"there is no home folder: HOME is {os.environ['HOME']}")
    moved = [name for name, default in FOLDERS.items() if name not in os.environ and not _writable(_default(default))]
    for name in moved:
        os.environ[name] = str(_scratch() / name.lower())
        Path(os.environ[name]).mkdir(parents=True, exist_ok=True)
    if moved:
        notes.append(f"caches cannot be written at {Path('~').expanduser()}: they are in {_scratch()}")
    return "; ".join(notes)


def _default(folder: str) -> Path:
    """Where a library looks by default."""
    for root, variable in XDG.items():
        if folder.startswith(root) and os.environ.get(variable):
            return Path(os.environ[variable], folder.removeprefix(root).lstrip("/"))
    return Path(folder).expanduser()


def _writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which may not exist yet."""
    # Path.exists raises where a folder above may not be entered.
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        # Root has every permission, but not on every file system.
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _scratch() -> Path:
    """A folder of this user for as long as the machine keeps temporary files."""
    folder = Path(tempfile.gettempdir(), f"unison-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _writable(folder):
        folder = Path(tempfile.mkdtemp(prefix="unison-"))
    return folder
