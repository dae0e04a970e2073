"""A run as a batch job of SLURM."""

import shlex
import sys
from pathlib import Path

from trainer.launchers import facts
from trainer.launchers.facts import Facts

ABOUT = "write a batch script for SLURM"
SUBMIT, SUFFIX = ["sbatch"], "sbatch"
SETTINGS = {
    "time": ("", "time limit, such as 24:00:00"),
    "partition": ("", "partition"),
    "account": ("", "account"),
    "cpus_per_node": ("", "CPUs of each node (default: the whole node, with its memory)"),
    "interface": ("", "network interface or address (unison cluster --interface)"),
}


def render(run: Facts, file: Path) -> str:
    """The batch script."""
    wanted = run.settings
    options = {"time": wanted["time"], "partition": wanted["partition"], "account": wanted["account"]}
    options |= {"cpus-per-task": wanted["cpus_per_node"]}
    # Else SLURM gives a task one CPU, and the memory of one.
    whole = [] if wanted["cpus_per_node"] else ["exclusive", "mem=0"]
    if run.gpus:
        options["gpus-per-node"] = f"{run.gpu}:{run.gpus}" if run.gpu else str(run.gpus)
    logs = Path(run.config.output_dir).resolve() / "slurm"
    # SLURM opens the output before the script can make a folder.
    logs.mkdir(parents=True, exist_ok=True)
    interface = f"--interface {shlex.quote(wanted['interface'])} " if wanted["interface"] else ""
    values = facts.places(run) | {
        "FILE": file.name,
        "OPTIONS": "\n".join(f"#SBATCH --{one}" for one in [*(f"{k}={v}" for k, v in options.items() if v), *whole]),
        "LOGS": logs,
        "CWD": shlex.quote(str(Path.cwd())),
        "UNISON": shlex.quote(str(Path(sys.executable).with_name("unison"))),
        "PYTHON": shlex.quote(sys.executable),
        "INTERFACE": interface,
        # A folder of the job's own: a second attempt finds the first one's, and no other job's.
        "FLAGS": f'{run.command} --output-dir {shlex.quote(str(logs.parent))}/job-"$SLURM_JOB_ID"'.strip(),
    }
    return facts.render("slurm.sbatch", values)


def told(run: Facts) -> list[tuple[str, str]]:
    """What was decided, for the terminal."""
    return [
        ("at SIGTERM", f"a checkpoint within {run.config.deadlines.stop_s:g} s, then the job is queued again"),
        ("run's folder", f"{Path(run.config.output_dir).resolve()}/job-ID/{run.config.name}, on every node"),
    ]


def secrets() -> dict[str, str]:
    """The head makes its own token."""
    return {}
