"""What a run would do, printed: settings, placement, memory."""

from rich.table import Table

from rl.config import Config
from rl.validate import check
from trainer.cluster.placement import plan
from trainer.runs.settings import plain_config
from trainer.tracking.terminal import console


def dry_run(config: Config) -> None:
    """Print the resolved config, the placement and what memory it needs. Starts no actor."""
    check(config)
    from trainer.cluster.ray_session import cluster_gpus
    from trainer.plan.memory import check_memory, needs, shape_of, there
    from trainer.plan.memory import rows as memory_rows
    from trainer.plan.preflight import check_rows, check_truncation

    gpus = cluster_gpus()
    placement = plan(config, cuda=gpus > 0, gpus=gpus)
    check_truncation(config, placement.device)
    console.print(plain_config(config), markup=False, highlight=False)
    table = Table("placement", "", show_header=True)
    for row in placement.table():
        table.add_row(*row)
    table.add_row("GPUs", f"{placement.gpus:g} asked for, {gpus:g} here")
    try:
        shape = shape_of(config.model)
    except OSError as error:
        table.add_row("memory", f"unknown: the config of {config.model} cannot be read ({str(error).splitlines()[0]})")
        console.print(table)
        return
    check_rows(config)
    found, limits = needs(config, placement, shape), there(config, placement)
    table.add_row("parameters", f"{shape.parameters:,}")
    trained = config.trainer.lora.rank * shape.adapted or shape.parameters
    if trained != shape.parameters:
        table.add_row("of adapters, trained alone", f"{trained:,}")
    for row in memory_rows(found, limits):
        table.add_row(*row)
    if config.save_every:
        # Adam's two moments and the masters, each in fp32; a new one is whole before an old one goes.
        disk = (config.keep_last + 1) * 12 * trained / 2**30
        table.add_row("disk for checkpoints", f"{disk:.2f} GiB, one every {config.save_every} steps")
    console.print(table)
    check_memory(config, found, limits)
