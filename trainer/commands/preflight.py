"""`unison preflight`: may a run start on these nodes? One table, and the first bad node by name."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from trainer.commands.load import load_recipe
from trainer.launch import configure
from trainer.plan.dry_run import disk_gib
from trainer.plan.plan import make_plan
from trainer.runs.settings import stack_versions
from trainer.tracking.terminal import console


def preflight(arguments: Sequence[str]) -> int:
    """Examine the nodes of a cluster; returns 1 where a run would fail."""
    parser = argparse.ArgumentParser(
        prog="unison preflight",
        usage="unison preflight nodes RECIPE.py [FLAGS of the recipe]",
        description="Examine every node of the cluster before a run: sources, versions, the folder of the runs, the "
        "model (it is fetched where it lacks), room on disk and in shared memory, and the speed of links. The exit "
        "status is 1 where something is wrong.",
        allow_abbrev=False,
    )
    parser.add_argument("what", choices=["nodes"], help="what to examine")
    parser.add_argument("recipe", metavar="RECIPE.py")
    asked, flags = parser.parse_known_args(arguments)
    os.environ.setdefault("RAY_ADDRESS", "auto")
    config, _ = configure(load_recipe(asked.recipe), flags)
    plan = make_plan(config)
    # Imported late: Ray takes a second that `--help` does not need.
    from trainer.cluster.nodes.preflight import examine

    found = examine(Path(config.output_dir), config.model, disk_gib(plan), stack_versions)
    table = Table("node", "GPUs", "disk GiB", "shared GiB", "MB/s to the next", "verdict")
    for each in found:
        numbers = (f"{each.gpus:g}", f"{each.disk:.0f}", f"{each.shared:.1f}", f"{each.link:.0f}" if each.link else "-")
        table.add_row(f"{each.host} ({each.address})", *numbers, escape("; ".join(each.wrong)) or "ready")
    console.print(table)
    plan.check_fits()
    bad = [each for each in found if each.wrong]
    if bad:
        console.print(f"node {bad[0].host} ({bad[0].address}) {bad[0].wrong[0]}", markup=False, highlight=False)
    return 1 if bad else 0
