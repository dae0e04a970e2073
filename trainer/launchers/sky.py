"""A run as a managed job of SkyPilot, on spot machines or others."""

import os
import secrets as random
import shlex
from pathlib import Path

from rl import checkout
from trainer.launchers import facts
from trainer.launchers.facts import Facts
from trainer.node.token import TOKEN

ABOUT = "write a managed job for SkyPilot"
SUBMIT, SUFFIX = ["sky", "jobs", "launch", "--yes", "--secret", TOKEN], "yaml"
SETTINGS = {
    "infra": ("", "where, such as aws, gcp or k8s"),
    "bucket": ("", "bucket for checkpoints, which every node mounts at /shared"),
    "on_demand": ("", "yes: no spot machines"),
}
PORT = 20_000
"""First of the ports of every node: its virtual machine is the run's own."""


def render(run: Facts, file: Path) -> str:
    """The task. Raises ValueError for settings that lack."""
    wanted = run.settings
    if not wanted["bucket"]:
        raise ValueError(f"--bucket is needed: {SETTINGS['bucket'][1]}")
    if run.gpus and not run.gpu:
        raise ValueError("--gpu is needed: the kind of GPU as SkyPilot names it, such as H100")
    if not run.recipe.is_relative_to(checkout.ROOT):
        raise ValueError(f"{run.recipe} is not uploaded: put the recipe into the checkout ({checkout.ROOT})")
    resources = {"infra": wanted["infra"], "accelerators": f"{run.gpu}:{run.gpus}" if run.gpus else ""}
    resources["use_spot"] = "false" if wanted["on_demand"] == "yes" else "true"
    values = facts.places(run) | {
        "FILE": file.name,
        "RESOURCES": "\n".join(f"  {name}: {value}" for name, value in resources.items() if value),
        "RECIPE": shlex.quote(str(run.recipe.relative_to(checkout.ROOT))),
        "BUCKET": wanted["bucket"],
        "FLAVOUR": "cuda" if run.gpus else "cpu",
        "PORT": PORT,
    }
    return facts.render("sky.yaml", values)


def told(run: Facts) -> list[tuple[str, str]]:
    """What was decided, for the terminal."""
    return [
        ("machines", "on demand" if run.settings["on_demand"] == "yes" else "spot"),
        ("run's folder", "/shared/runs"),
    ]


def secrets() -> dict[str, str]:
    """The token, in the environment of `sky` alone."""
    return {TOKEN: os.environ.get(TOKEN) or random.token_hex(32)}
