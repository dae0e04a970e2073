"""Do updates arrive over NCCL, and is an engine that is killed in one replaced? With two GPUs or more."""

import argparse

import torch
from gpu.setting import Result
from gpu.update import update


def nccl(args: argparse.Namespace) -> Result:
    """The phase `update` with a GPU for the engine and the others, at most three, for ranks at ZeRO 3.

    On CPU there are two ranks. Then the same with an engine that receives while it samples.
    """
    gpus = torch.cuda.device_count() if args.device == "cuda" else 3
    if gpus < 2:
        return {"GPUs": gpus, "not run": "it needs two"}
    ranks = min(3, gpus - 1)
    still, aside = update(args, ranks), update(args, ranks, aside=True)
    return (
        {"GPUs": gpus if args.device == "cuda" else 0}
        | still
        | {f"{name}, received while sampling": aside[name] for name in ("seconds", "pause_seconds")}
        | {"problems": still["problems"] + aside["problems"]}
    )
