"""Do updates arrive over NCCL, and is an engine that is killed in one replaced? With two GPUs or more."""

import argparse

import torch
from gpu.setting import Result
from gpu.update import update


def nccl(args: argparse.Namespace) -> Result:
    """The phase `update` with a GPU for the engine and the others, at most three, for ranks at ZeRO 3.

    On CPU there are two ranks.
    """
    gpus = torch.cuda.device_count() if args.device == "cuda" else 3
    if gpus < 2:
        return {"GPUs": gpus, "not run": "it needs two"}
    return {"GPUs": gpus if args.device == "cuda" else 0} | update(args, ranks=min(3, gpus - 1))
