"""`unison launch`: one readable file that runs a recipe on SLURM, Kubernetes or SkyPilot."""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.commands.load import load_recipe
from trainer.launch import configure
from trainer.launchers import k8s, sky, slurm
from trainer.launchers.facts import facts
from trainer.tracking.terminal import console

KINDS = {"slurm": slurm, "k8s": k8s, "sky": sky}


def launch_on(arguments: Sequence[str]) -> int:
    """Write the file; send it with --submit."""
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    before, flags = words[:at], words[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="unison launch",
        usage="unison launch slurm|k8s|sky RECIPE.py --nodes N --gpus-per-node N [OPTIONS] [-- FLAGS of the recipe]",
        description="Write one file that runs a recipe on several nodes, and refuse what cannot fit there. Nothing is "
        "sent without --submit.",
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="slurm|k8s|sky")
    for kind, module in KINDS.items():
        prog = f"unison launch {kind} RECIPE.py"
        one = kinds.add_parser(kind, prog=prog, help=module.ABOUT, description=module.ABOUT, allow_abbrev=False)
        one.add_argument("recipe", metavar="RECIPE.py")
        one.add_argument("--nodes", type=int, default=1, help="nodes (default: 1)")
        one.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of each (default: 8; 0 is a run on CPU)")
        one.add_argument("--gpu", default="", help="their kind, as the scheduler names it")
        one.add_argument("--gpu-gib", type=float, help="memory of one GPU: the run is refused where it does not fit")
        one.add_argument("--out", metavar="FILE", help="the file to write (default: NAME.sbatch, or NAME.yaml)")
        one.add_argument("--force", action="store_true", help="replace the file")
        one.add_argument("--submit", action="store_true", help=f"also run `{' '.join(module.SUBMIT)} FILE`")
        for name, (default, text) in module.SETTINGS.items():
            shown = f" (default: {default})" if default else ""
            one.add_argument(f"--{name.replace('_', '-')}", default=default, help=text + shown)
        if kind == "k8s":
            one.add_argument("--check", action="store_true", help="RECIPE.py is a manifest: name its mistakes, and end")
    asked, unknown = parser.parse_known_args(before)
    if unknown:
        raise ValueError(f"{unknown[0]} is no option of `unison launch`: flags of the recipe come after --")
    module = KINDS[asked.kind]
    if getattr(asked, "check", False):
        return checked(Path(asked.recipe))
    config, given = configure(load_recipe(asked.recipe), flags)
    settings = {name: getattr(asked, name) for name in module.SETTINGS}
    size = {"nodes": asked.nodes, "gpus": asked.gpus_per_node, "gpu": asked.gpu, "gpu_gib": asked.gpu_gib}
    run = facts(Path(asked.recipe).resolve(), config, given, **size, **settings)
    file = Path(asked.out or f"{run.name}.{module.SUFFIX}").resolve()
    if file.exists() and not asked.force:
        raise ValueError(f"{file} exists, and may hold changes of yours: give --out another name, or --force")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(module.render(run, file))
    for what, value in [*run.plan.placement.table(), ("nodes", f"{run.nodes} x {run.gpus} GPUs"), *module.told(run)]:
        console.print(f"{what}: {value}", highlight=False, markup=False)
    if run.idle > 0:
        console.print(f"{run.idle} GPUs stay idle: raise --rollout.engines or --trainer.ranks", highlight=False)
    command = [*module.SUBMIT, str(file)]
    if not asked.submit or not shutil.which(command[0]):
        lacks = f" {command[0]} is not installed here." if asked.submit else ""
        command = [*(f"{name}=$(openssl rand -hex 32)" for name in module.secrets()), *command]
        console.print(f"written: {file}.{lacks} Send it with: {' '.join(command)}", highlight=False, soft_wrap=True)
        return 1 if asked.submit else 0
    return subprocess.run(command, env=os.environ | module.secrets()).returncode


def checked(file: Path) -> int:
    """Name the mistakes of a manifest."""
    found = k8s.mistakes(file.read_text())
    if not found:
        print(f"no mistakes found in {file}")
    for line, text in found:
        print(f"{file}:{line}: {text}", file=sys.stderr)
    return 1 if found else 0
