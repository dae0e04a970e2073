"""What a run would do, printed: settings, placement, memory."""

from rich.table import Table

from rl.config import Config
from trainer.plan.plan import Plan, make_plan
from trainer.runs.settings import plain_config
from trainer.tracking.terminal import console


def dry_run(config: Config) -> None:
    """Print settings, placement and memory, and start no actor. Raises what a run would raise before its start, but
    for GPUs that are missing here: those of another machine may be planned."""
    plan = make_plan(config)
    console.print(plain_config(config), markup=False, highlight=False)
    table = Table("placement", "", show_header=True)
    for row in plan.placement.table():
        table.add_row(*row)
    table.add_row("GPUs", f"{plan.placement.gpus:g} asked for, {plan.gpus:g} here")
    try:
        shape = plan.memory.shape
    except OSError:
        console.print(table)
        raise
    table.add_row("parameters", f"{shape.parameters:,}")
    trained = config.trainer.lora.rank * shape.adapted or shape.parameters
    if trained != shape.parameters:
        table.add_row("of adapters, trained alone", f"{trained:,}")
    for row in plan.memory.rows():
        table.add_row(*row)
    if config.save_every:
        table.add_row("disk for checkpoints", f"{disk_gib(plan):.2f} GiB, one every {config.save_every} steps")
    console.print(table)
    for note in plan.notes():
        console.print(note, style="yellow", markup=False, highlight=False)
    plan.check_model()


def disk_gib(plan: Plan) -> float:
    """GiB of a run's checkpoints. Raises OSError where there is no model."""
    config, shape = plan.config, plan.memory.shape
    trained = config.trainer.lora.rank * shape.adapted or shape.parameters
    # Adam's two moments and the masters, each in fp32; a new checkpoint is complete before an old one goes.
    return (config.keep_last + 1) * 12 * trained / 2**30 if config.save_every else 0.0
