"""Which hardware and software is this?"""

import argparse
import inspect
import subprocess

import torch
from gpu.setting import Result
from torch.nn.attention.varlen import varlen_attn

from trainer.machine import cores
from trainer.runs.settings import stack_versions


def facts(args: argparse.Namespace) -> Result:
    """Versions, the card, and what decides code paths."""
    found: Result = {"cores": cores(), "varlen_attn": list(inspect.signature(varlen_attn).parameters)}
    if args.device == "cuda":
        p = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        found |= {"gpu": p.name, "memory_gib": total / 2**30, "free_gib": free / 2**30}
        found |= {"capability": f"{p.major}.{p.minor}", "cuda": torch.version.cuda, "nccl": torch.cuda.nccl.version()}
        query = ["nvidia-smi", "--query-gpu=driver_version,uuid,clocks.sm,clocks.mem", "--format=csv,noheader"]
        found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found | stack_versions()
