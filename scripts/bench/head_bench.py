"""What do chunked log-probabilities cost, compared with all logits at once?

    python scripts/bench/head_bench.py --turns 3 --out docs/head.json     # some minutes on two slow cores

Forward and backward of log-probability and entropy in fp32, in one thread. Seconds are CPU seconds, so other processes
on the machine have little influence. Memory is the process's peak above its memory before. Variants alternate. The
gradient's error is relative, by norm, to all logits at once in fp32 and in fp64.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainer.model.head
from trainer.model.head import LogprobHead

LogprobAndEntropy = tuple[Tensor, Tensor]
"""[N] each."""


def whole(head: LogprobHead, hidden: Tensor, targets: Tensor) -> LogprobAndEntropy:
    """All logits at once, [N, V] for forward and backward."""
    log_p = F.linear(hidden, head.weight).log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def chunked(rows: int) -> Callable[[LogprobHead, Tensor, Tensor], LogprobAndEntropy]:
    def forward(head: LogprobHead, hidden: Tensor, targets: Tensor) -> LogprobAndEntropy:
        trainer.model.head.CHUNK = rows
        return head(hidden, targets, 1.0)

    return forward


def peak_mib() -> float:
    """The largest resident set since `reset_peak`."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def reset_peak() -> float:
    """Reset the recorded peak; returns the current resident set."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


def measure(
    forward: Callable[..., LogprobAndEntropy], head: LogprobHead, hidden: Tensor, targets: Tensor, upstream: Tensor
) -> Any:
    head.weight.grad = hidden.grad = None
    before, began = reset_peak(), time.process_time()
    logprob, entropy = forward(head, hidden, targets)
    (upstream[0] * logprob + upstream[1] * entropy).sum().backward()
    seconds = time.process_time() - began
    return seconds, peak_mib() - before, (hidden.grad, head.weight.grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tokens": 2048, "hidden": 576, "vocabulary": 49152, "turns": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lm_head = nn.Linear(args.hidden, args.vocabulary, bias=False)
    head = LogprobHead(lm_head, fp32=True)
    hidden = torch.randn(args.tokens, args.hidden).requires_grad_()
    targets, upstream = torch.randint(0, args.vocabulary, (args.tokens,)), torch.randn(2, args.tokens)
    variants = {"whole": whole} | {f"chunks of {n}": chunked(n) for n in (64, 128, 256, 512, 1024)}
    found: dict[str, list[Any]] = {name: [] for name in variants}
    for _ in range(args.turns):
        for name, forward in variants.items():
            found[name].append(measure(forward, head, hidden, targets, upstream)[:2])

    few = slice(0, min(512, args.tokens))
    exact = LogprobHead(nn.Linear(args.hidden, args.vocabulary, bias=False).double(), fp32=True)
    exact.weight.data.copy_(head.weight.data)
    double = hidden.detach()[few].double().requires_grad_()
    want = measure(whole, exact, double, targets[few], upstream[:, few])[2]

    def distance(one: Any, other: Any) -> float:
        return max(float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))

    base, table = found["whole"], []
    whole_fp32: Any = None
    for name, runs in found.items():
        part = hidden.detach()[few].requires_grad_()
        got = measure(variants[name], head, part, targets[few], upstream[:, few])[2]
        whole_fp32 = got if name == "whole" else whole_fp32
        seconds, memory = (statistics.median(r[i] for r in runs) for i in (0, 1))
        table.append(
            {
                "logits": name,
                "cpu_seconds": seconds,
                "of_whole_seconds": statistics.median(r[0] / b[0] for r, b in zip(runs, base, strict=True)),
                "peak_mib": memory,
                "of_whole_peak": memory / statistics.median(b[1] for b in base),
                "error_fp32": distance(got, whole_fp32),
                "error_fp64": distance(got, want),
            }
        )
    print("| logits | CPU s | of whole | peak MiB | of whole | gradient from fp32 | from fp64 |")
    print("|---|---|---|---|---|---|---|")
    for r in table:
        speed = f"{r['cpu_seconds']:.2f} | {r['of_whole_seconds']:.2f}x"
        memory = f"{r['peak_mib']:.0f} | {r['of_whole_peak']:.0%}"
        print(f"| {r['logits']} | {speed} | {memory} | {r['error_fp32']:.1e} | {r['error_fp64']:.1e} |")
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        args.out.write_text(json.dumps({"settings": settings, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
