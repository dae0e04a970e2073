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

RESOURCE = (r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", "the name of a resource: small letters, digits, - and .")
NUMBER = (r"[1-9]\d*", "a number of 1 or more")
FORMS = {
    "time": (r"(\d+-)?\d+(:\d\d){0,2}", "MINUTES, HH:MM:SS or D-HH:MM:SS"),
    "image": (r"[a-z0-9./_-]+(:\d+/[a-z0-9./_-]+)?(:[\w.-]+)?(@sha256:\w+)?", "HOST/NAME:TAG, in small letters"),
    "on_demand": ("yes|no", "yes or no"),
    "attempts": (r"\d+", "a number"),
    **dict.fromkeys(("claim", "secret", "queue", "bucket"), RESOURCE),
    **dict.fromkeys(("cpus", "cpus_per_node"), NUMBER),
}
"""The values that a setting of a scheduler may have, and in words. Others have no space, quote, `=` or newline."""
LIKE_A_SECRET = r"(hf_|sk-|ghp_|github_pat_|wandb_v1_)\w{8,}"
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
    def idle(self) -> int:
        """GPUs that the run does not use, at least; engines of an elastic run may take them."""
        return 0 if self.config.rollout.max_engines else self.nodes * self.gpus - math.ceil(self.plan.placement.gpus)

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
        raise ValueError(f"--nodes {nodes} and --gpus-per-node {gpus}: a run needs 1 node or more, 0 GPUs or more")
    for name, value in {"gpu": gpu, **settings}.items():
        form, words = FORMS.get(name, (r"[\w.,:/@+-]*", "letters, digits and .,:/@+-"))
        if value and not re.fullmatch(form, value):
            raise ValueError(f"--{name.replace('_', '-')}: write {words}")
    if any(re.search(LIKE_A_SECRET, flag) for flag in flags):
        raise ValueError("a flag of the recipe looks like a secret, and the file would show it: use the environment")
    if gpu_gib is not None and (gpu_gib <= 0 or not gpus):
        raise ValueError(f"--gpu-gib {gpu_gib:g} and --gpus-per-node {gpus}: leave --gpu-gib out, or give a GPU's GiB")
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
