"""Are the learner's kernels right, and how fast? Attention, the head, digests and whole passes, without vLLM."""

import argparse
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from echo_task import make_model
from gpu.setting import Result, error, seconds
from torch import nn

import trainer.model.product
from rl.weights import digest
from trainer.learner.hardware import peak_of
from trainer.model.attention import Segment, attend_segments
from trainer.model.head import LogprobHead
from trainer.model.policy import load


def kernels(args: argparse.Namespace) -> Result:
    """Each part is measured even where another fails."""
    result: Result = {"problems": []}
    for part in (attention, head, digests, passes):
        try:
            found = part(args)
        except Exception as failed:  # the other parts are still measured
            found = {"problems": [f"{type(failed).__name__}: {str(failed)[:500]}"]}
        result["problems"] += [f"{part.__name__}: {p}" for p in found.pop("problems", [])]
        result |= {f"{part.__name__}.{name}": value for name, value in found.items()}
    return result


def attention(args: argparse.Namespace) -> Result:
    """Attention of packed rows, forward and backward: its error in fp64, next to that of torch's own attention."""
    cuda = args.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    lengths = (700, 1, 64, 1283, 333) if cuda else (70, 1, 6, 33)
    segments = [Segment(lengths=(n,)) for n in lengths]
    result: Result = {"problems": []}
    for heads, groups, width in ((14, 2, 64), (28, 4, 128), (16, 16, 128)):
        g = torch.Generator(args.device).manual_seed(0)
        shape = {"generator": g, "device": args.device, "dtype": dtype}
        q = torch.randn(1, heads, sum(lengths), width, **shape).requires_grad_()
        k, v = (torch.randn(1, groups, sum(lengths), width, **shape).requires_grad_() for _ in range(2))
        up = torch.randn(1, sum(lengths), heads, width, **shape)
        scaling = width**-0.5

        def gradients(attend: Any, dtype: torch.dtype, inputs=(q, k, v), up=up) -> list[torch.Tensor]:
            leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
            out = attend(*leaves)
            return [out.detach(), *torch.autograd.grad((out * up.to(dtype)).sum(), leaves)]

        def packed(q, k, v, scaling=scaling):
            return attend_segments(q, k, v, segments=segments, scaling=scaling)

        def plain(q, k, v, scaling=scaling):
            parts = zip(*(x.split(list(lengths), dim=2) for x in (q, k, v)), strict=True)
            return torch.cat([dense(*p, scaling) for p in parts], dim=1)

        def sdpa(q, k, v, scaling=scaling):
            parts = zip(*(x.split(list(lengths), dim=2) for x in (q, k, v)), strict=True)
            how = {"is_causal": True, "scale": scaling, "enable_gqa": True}
            return torch.cat([F.scaled_dot_product_attention(*p, **how).transpose(1, 2) for p in parts], dim=1)

        want = gradients(plain, torch.float64)
        ours, torchs = ([error(a, b) for a, b in zip(gradients(f, dtype), want, strict=True)] for f in (packed, sdpa))
        name = f"{heads}/{groups} heads of {width}"
        result[name] = {
            "ours": ours,
            "sdpa": torchs,
            "ms": 1e3 * seconds(lambda: gradients(packed, dtype), args.device),
        }
        if not all(a < max(2 * b, 1e-6) for a, b in zip(ours, torchs, strict=True)):
            result["problems"].append(f"{name}: errors {ours} of the packed kernel, {torchs} of torch's attention")
    return result


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention by its formula, in the dtype of its arguments."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scaling
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return (scores.masked_fill(~keep, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def head(args: argparse.Namespace) -> Result:
    """The fp32 head over bf16 weights: on tensor cores, in fp32 arithmetic, and both against fp64."""
    cuda = args.device == "cuda"
    tokens, hidden, vocabulary = (8192, 1536, 151936) if cuda else (64, 64, 512)
    g = torch.Generator(args.device).manual_seed(0)
    how = {"generator": g, "device": args.device, "dtype": torch.bfloat16}
    lm_head = nn.Linear(hidden, vocabulary, bias=False, device=args.device, dtype=torch.bfloat16)
    with torch.no_grad():
        lm_head.weight.copy_(torch.randn(vocabulary, hidden, **how) * 0.05)
    states = torch.randn(tokens, hidden, **how).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=g, device=args.device)
    up = torch.randn(2, tokens, generator=g, device=args.device)

    def run(rows: int = tokens) -> list[torch.Tensor]:
        answers = LogprobHead(lm_head, fp32=True)(states[:rows], targets[:rows], 0.8)
        loss = (up[0, :rows] * answers[0] + 1e-2 * up[1, :rows] * answers[1]).sum()
        return [a.detach() for a in answers] + list(torch.autograd.grad(loss, [states, lm_head.weight]))

    def exact(rows: int) -> list[torch.Tensor]:
        leaves = [states[:rows].detach().double(), lm_head.weight.detach().double()]
        leaves = [x.requires_grad_() for x in leaves]
        log_p = (leaves[0] @ leaves[1].t() / 0.8).log_softmax(-1)
        answers = log_p.gather(-1, targets[:rows, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        loss = (up[0, :rows] * answers[0] + 1e-2 * up[1, :rows] * answers[1]).sum()
        grads = torch.autograd.grad(loss, leaves)
        whole = torch.zeros_like(states, dtype=torch.float64)
        whole[:rows] = grads[0]
        return [a.detach() for a in answers] + [whole, grads[1]]

    rows = 512 if cuda else tokens
    want = exact(rows)
    slow = patch.object(trainer.model.product, "on_tensor_cores", lambda *_: False)
    result: Result = {"problems": []}
    for name, change in (("tensor cores", nullcontext()), ("fp32 cores", slow)):
        with change:
            got = run(rows)
            result[name] = {
                "worst_nats": float((got[0].double() - want[0]).abs().max()),
                "errors": [error(a, b) for a, b in zip(got, want, strict=True)],
                "us_per_token": 1e6 * seconds(run, args.device, 3) / tokens,
            }
    # Gradients are rounded to bf16 at the end (4e-3); log-probabilities are not.
    if not result["tensor cores"]["worst_nats"] < 1e-4 or not max(result["tensor cores"]["errors"]) < 5e-3:
        result["problems"].append(f"the head on tensor cores is not exact: {result['tensor cores']}")
    return result


def digests(args: argparse.Namespace) -> Result:
    """A digest of a tensor is the same on CPU and GPU."""
    tensor = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    pairs = [(digest(x), digest(x.to(args.device))) for x in (tensor, tensor.bfloat16())]
    problems = [f"a digest differs between CPU and {args.device}: {a}, {b}" for a, b in pairs if a != b]
    big = torch.zeros(2**28 if args.device == "cuda" else 2**20, dtype=torch.bfloat16, device=args.device)
    speed = big.nbytes / 1e9 / seconds(lambda: digest(big), args.device, 3)
    return {"gb_per_s": speed, "problems": problems}


def passes(args: argparse.Namespace) -> Result:
    """Tokens per second, model FLOPs utilisation (MFU) and memory of the policy's forward and backward pass."""
    cuda = args.device == "cuda"
    shape = {"hidden": 1536, "inner": 8960, "layers": 28, "vocabulary": 151936}  # Qwen2.5-1.5B
    shape = shape if cuda else {"hidden": 128, "inner": 128, "layers": 2, "vocabulary": 64}
    model = make_model(Path(args.work) / "passes", device=args.device, **shape)
    rows, length, prompt = (16, 512, 128) if cuda else (4, 32, 8)
    g = torch.Generator(args.device).manual_seed(0)
    ids = torch.randint(3, shape["vocabulary"], (rows, length), generator=g, device=args.device)
    mask = (torch.arange(length - 1, device=args.device) >= prompt - 1).expand(rows, -1)
    peak = peak_of(torch.device(args.device)) if cuda else None
    result: Result = {}
    for checkpointing in (False, True):
        policy = load(model, dtype="bfloat16", fp32_head=True, share_prompts=False, checkpointing=checkpointing)
        policy = policy.to(args.device)
        parameters = sum(p.numel() for p in policy.parameters()) - policy.hf.get_input_embeddings().weight.numel()
        head_flops = 2 * shape["hidden"] * shape["vocabulary"] * int(mask.sum())
        # 12 L H S per token of causal attention, forward and backward, is left out: below 2 % at this length.
        flops = 3 * (2 * parameters * rows * length + head_flops)

        def both(policy: Any = policy) -> None:
            policy.zero_grad(set_to_none=True)
            policy(ids, mask, 1.0).logprobs.sum().backward()

        def forward(policy: Any = policy) -> None:
            with torch.no_grad():
                policy(ids, mask, 1.0)

        if cuda:
            torch.cuda.reset_peak_memory_stats()
        took = SimpleNamespace(both=seconds(both, args.device, 3), forward=seconds(forward, args.device, 3))
        found = {"tokens_per_s": rows * length / took.both, "forward_tokens_per_s": rows * length / took.forward}
        if peak:
            found |= {"mfu": flops / took.both / peak, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
        result["checkpointing" if checkpointing else "all activations"] = found
        del policy, both, forward
    return result
