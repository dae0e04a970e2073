"""What does a run ask of the nodes it is sent to? Checked on the submitting machine, before anything is queued."""

import math
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from rl import checkout
from rl.config import Config
from trainer.plan.memory import memory_of_gpus
from trainer.plan.plan import Plan, make_plan

LEAST_GRACE = 30
"""Seconds for ending the run after it has saved."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A recipe with its flags, and the nodes for it."""

    recipe: Path
    flags: list[str]
    config: Config
    plan: Plan
    nodes: int
    gpus: int
    """On each node."""
    gpu: str = ""
    """Their kind, as the scheduler names it."""
    settings: dict[str, str]
    """What only one scheduler knows."""

    @property
    def name(self) -> str:
        """The run's name as schedulers accept it."""
        return re.sub(r"[^a-z0-9]+", "-", self.config.name.lower()).strip("-")[:40]

    @property
    def command(self) -> str:
        """The recipe's flags as a shell reads them."""
        return shlex.join(self.flags)

    @property
    def grace_s(self) -> int:
        """Seconds between SIGTERM and the end of a job."""
        return math.ceil(self.config.deadlines.stop_s) + LEAST_GRACE

    @property
    def shared_gib(self) -> int:
        """GiB of shared memory for a node's pods: Ray's objects, NCCL's and vLLM's buffers, and weights on CPU."""
        weights = self.plan.memory.required["host"].get("weights under way", 0.0)
        return max(2 + 2 * self.gpus, math.ceil(2 + 2 * weights))


def facts(
    recipe: Path,
    config: Config,
    flags: list[str],
    *,
    nodes: int,
    gpus: int,
    gpu: str = "",
    gpu_gib: float | None = None,
    **settings: str,
) -> Facts:
    """Check that a run fits. Raises ValueError, with the remedy, for what cannot run there."""
    if nodes < 1 or gpus < 0:
        raise ValueError(f"--nodes {nodes} and --gpus-per-node {gpus}: a run needs one node or more")
    if gpu_gib is not None and not gpus:
        raise ValueError(f"--gpu-gib {gpu_gib:g} and --gpus-per-node 0: leave --gpu-gib out")
    if gpus and config.device == "cpu":
        raise ValueError(f"device=cpu, and --gpus-per-node {gpus}: ask for none, or set --device cuda")
    if bad := {"--resume", "--dry-run", "--help"} & {flag.partition("=")[0] for flag in flags}:
        raise ValueError(f"{sorted(bad)[0]} cannot be sent: a second attempt of the job resumes by itself")
    plan = make_plan(config, nodes=[float(gpus)] * nodes)
    if plan.placement.device == "cuda":
        plan.check_fits()
    if gpu_gib is not None:
        own = memory_of_gpus(config, plan.placement, gpu_gib)
        replace(plan.memory, available=dict.fromkeys(plan.memory.required, math.inf) | own).check(config)
    plan.check_rules()
    return Facts(
        recipe=recipe, flags=flags, config=config, plan=plan, nodes=nodes, gpus=gpus, gpu=gpu, settings=settings
    )


def render(kind: str, values: dict[str, object]) -> str:
    """A template with its values; lines that are then empty are left out. Raises KeyError for a value that lacks."""
    text = (Path(__file__).parent / kind).read_text()
    lines = []
    for line in text.splitlines():
        filled = re.sub(r"@([A-Z_]+)@", lambda found: str(values[found[1]]), line)
        if filled.strip() or not line.strip():
            lines.append(filled.rstrip())
    return "\n".join(lines) + "\n"


def places(facts: Facts) -> dict[str, object]:
    """Values that every template has."""
    return {
        "WHAT": f"{facts.recipe.name} on {facts.nodes} nodes with {facts.gpus} GPUs each",
        "NAME": facts.name,
        "NODES": facts.nodes,
        "GPUS": facts.gpus,
        "RECIPE": shlex.quote(str(facts.recipe)),
        "FLAGS": facts.command,
        "STOP_S": f"{facts.config.deadlines.stop_s:g}",
        "GRACE_S": facts.grace_s,
        "CHECKOUT": checkout.ROOT,
    }
