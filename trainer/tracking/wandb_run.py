"""The run in Weights & Biases."""

import netrc
import os

from rl.config import TrackingConfig


def wandb_mode(config: TrackingConfig) -> str:
    """online when asked for, or when a key is at hand; never a prompt for one."""
    if config.wandb != "auto":
        return {"off": "disabled"}.get(config.wandb, config.wandb)
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    try:
        known = "api.wandb.ai" in netrc.netrc().hosts
    except (FileNotFoundError, netrc.NetrcParseError):
        known = False
    return "online" if known or os.environ.get("WANDB_API_KEY") else "offline"
