"""Is Weights & Biases on, and does it reach its server?"""

import netrc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from rl.config import TrackingConfig
from rl.typed import shortened
from trainer.tracking.backend import About

REACH_S, INSIST_S = 10.0, 60.0
"""Seconds in which W&B's server must answer before the run goes offline, or ends because it must be online."""


def wandb_mode(config: TrackingConfig) -> str:
    """W&B's own word for the mode: online when asked for, or when a key is at hand. It never asks for a key.

    Raises ValueError for a WANDB_MODE that does not exist.
    """
    if config.wandb != "auto":
        return {"off": "disabled"}.get(config.wandb, config.wandb)
    wanted = os.environ.get("WANDB_MODE")
    if wanted not in (None, "", "online", "offline", "disabled"):
        raise ValueError(f"WANDB_MODE={wanted!r} is not one of online, offline, disabled")
    return wanted or ("online" if os.environ.get("WANDB_API_KEY") or key_in_netrc()[0] else "offline")


def insists(config: TrackingConfig) -> bool:
    """Whether the run must not begin while W&B is away."""
    return wandb_mode(config) == "online" and "online" in (config.wandb, os.environ.get("WANDB_MODE"))


def key_in_netrc() -> tuple[bool, str]:
    """Whether the file of logins has a key of W&B's server, and why it cannot be read where that is so."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    file = os.environ.get("NETRC") or "~/.netrc"
    try:
        return host in netrc.netrc(Path(file).expanduser()).hosts, ""
    except FileNotFoundError:
        return False, ""
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError, RuntimeError) as error:
        return False, f"{file} cannot be read ({error}), so it is not known whether you are logged in"


def reached(about: About, begin: Callable[[str], Any]) -> tuple[Any, str]:
    """What `begin` returns in the run's mode, or offline where that fails; and what the user must know, as "title:
    text". Raises ValueError where W&B must be online, or cannot even begin offline."""
    config, mode, why = about.config, wandb_mode(about.config), ""
    for each in dict.fromkeys([mode] if insists(config) else [mode, "offline"]):
        try:
            run = begin(each)
        except Exception as error:  # W&B raises errors of its own, of its client and of the system
            first = shortened(str(error).partition("\n")[0], 300)  # without advice about settings that are not ours
            why += f"{'; and offline, ' if why else ''}{type(error).__name__}: {first}"
            continue
        asked = config.wandb != "auto" or os.environ.get("WANDB_MODE")
        note = "" if asked else key_in_netrc()[1]
        if why:
            later = f"wandb sync {about.folder}/wandb/offline-run-*"
            note = f"the server did not take the run ({why}). Send it later: {later}"
        return run, f"W&B is not online: {note}" if note else ""
    if not insists(config):
        raise ValueError(f"no W&B run could be begun ({why})")
    raise ValueError(
        f"W&B must be online (tracking.wandb=online, or WANDB_MODE), and it is not: {why}. Use --tracking.wandb auto, "
        "which goes offline, or offline"
    )
