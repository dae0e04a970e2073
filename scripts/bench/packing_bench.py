"""What does padding cost the trainer? Forward and backward passes over heavy-tailed sequences in four layouts.

    python scripts/bench/packing_bench.py --turns 3 --out docs/packing.json     # some minutes on two slow cores

Reply lengths are lognormal; their 99th percentile is ten times the median. Each layout gets the micro-batches that the
trainer would make for it, and runs a forward and a backward pass over all of them; layouts alternate. "padded" and
"dense mask" (one padded row per group) are the layouts before packing. Seconds are CPU seconds, so other processes on
the machine have little influence.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rl.batch import collate, lengths, micro_batches, take
from rl.types import Batch, Trajectory
from trainer.model.packing import pack
from trainer.model.policy import Policy


def step_of(groups: int, size: int, prompt: int, median: int, longest: int) -> Batch:
    """The batch of one step: `groups` groups of `size` replies, each group with one prompt of `prompt` tokens."""
    sigma, g = math.log(10.0) / 2.326, torch.Generator().manual_seed(0)
    rows = []
    for group in range(groups):
        prompt_ids = torch.randint(1, 4000, (prompt,), generator=g).tolist()
        for _ in range(size):
            n = min(longest, max(1, round(median * math.exp(sigma * float(torch.randn(1, generator=g))))))
            rows.append(
                Trajectory(
                    group=group,
                    token_ids=prompt_ids + torch.randint(1, 4000, (n,), generator=g).tolist(),
                    mask=[False] * prompt + [True] * n,
                    logprobs=[0.0] * prompt + [-1.0] * n,
                    versions=[-1] * prompt + [0] * n,
                    reward=0.0,
                )
            )
    return collate(rows)


def trees(policy: Policy, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states from padded rows [G, W], one row per prompt with all its replies, and a dense mask [G, 1, W, W]."""
    _, group = ids[:, : int(mask[0].int().argmax()) + 1].unique(dim=0, return_inverse=True)
    chosen = [(group == g).nonzero()[:, 0] for g in range(int(group.max()) + 1)]
    parts = [pack(ids[rows], mask[rows], share_prompts=True) for rows in chosen]
    width = max(part.input_ids.shape[1] for part in parts)
    laid = torch.zeros(2, len(parts), width, dtype=torch.long)
    allowed = torch.eye(width, dtype=torch.bool).repeat(len(parts), 1, 1)
    source = torch.zeros(mask.shape, dtype=torch.long)
    for g, (part, rows) in enumerate(zip(parts, chosen, strict=True)):
        n, start = part.input_ids.shape[1], 0
        laid[0, g, :n], laid[1, g, :n] = part.input_ids[0], part.position_ids[0]
        for s in part.segments:
            own = sum(s.lengths)
            end, p = start + own, s.prompt_length
            seen = torch.block_diag(*[torch.ones(n, n, dtype=torch.bool).tril() for n in s.lengths])
            allowed[g, start:end, start:end] = seen
            allowed[g, start:end, :p] = True
            start = end
        of_rows = torch.zeros(mask[rows].shape, dtype=torch.long).masked_scatter(mask[rows], part.source + g * width)
        source[rows] = of_rows
    policy.tokens += torch.tensor([sum(part.input_ids.numel() for part in parts), laid[0].numel()])
    body = policy.hf.get_decoder()
    out = body(input_ids=laid[0], position_ids=laid[1], attention_mask=allowed[:, None], use_cache=False)
    return out.last_hidden_state.flatten(0, 1).index_select(0, source[mask])


def pass_over(policy: Policy, batch: Batch, budget: int, layout: str) -> float:
    """CPU seconds of one forward and backward pass over a whole step."""
    policy.share_prompts, policy.packs = layout in ("shared", "dense mask"), layout in ("packed", "shared")
    policy.hf.set_attn_implementation("segments" if policy.packs else "sdpa")
    original = policy._hidden
    if layout == "dense mask":
        policy._hidden = lambda ids, mask: (trees(policy, ids, mask), None)
    policy.zero_grad()
    began = time.process_time()
    (cut,) = micro_batches(
        batch, torch.arange(len(batch.rewards)), ranks=1, budget=budget, share_prompts=policy.share_prompts
    )
    for rows in cut:
        part = take(batch, rows)
        output = policy(part.input_ids, part.mask, 1.0)
        (output.logprobs * torch.linspace(-1, 1, part.mask.shape[1])).sum().backward()
    seconds = time.process_time() - began
    policy._hidden = original
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"groups": 16, "group-size": 4, "prompt": 48, "median": 48, "longest": 1024, "budget": 4096, "turns": 3}
    for name, default in (numbers | {"hidden": 256, "layers": 4, "threads": 1}).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 128,
        max_position_embeddings=4096,
    )
    policy = Policy(LlamaForCausalLM(config), fp32_head=True, with_values=False, share_prompts=True)
    batch = step_of(args.groups, args.group_size, args.prompt, args.median, args.longest)
    replies = batch.mask.sum(dim=1)
    tail = float(replies.float().quantile(0.99) / replies.float().median())
    print(f"{len(replies)} replies of {int(replies.min())} to {int(replies.max())} tokens, p99/median {tail:.1f}")
    layouts = ["padded", "packed", "dense mask", "shared"]
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    useful = {}
    for turn in range(args.turns + 1):
        for name in layouts:
            policy.tokens.zero_()
            took = pass_over(policy, batch, args.budget, name)
            if turn:  # the first is a warm-up
                seconds[name].append(took)
            useful[name] = float(policy.tokens[0] / policy.tokens[1])
    # The objective sees the same tokens in every layout, so this speed is comparable.
    tokens = int(lengths(batch).sum())
    rows = []
    for name in layouts:
        base = "dense mask" if name == "shared" else "padded"
        ratio = statistics.median(b / s for b, s in zip(seconds[base], seconds[name], strict=True))
        rows.append(
            {
                "layout": name,
                "useful_tokens_frac": useful[name],
                "seconds": statistics.median(seconds[name]),
                "tokens_per_s": tokens / statistics.median(seconds[name]),
                "against": base,
                "speedup": ratio,
                "all_seconds": seconds[name],
            }
        )
    print("| layout | useful tokens | CPU s | tokens/s | speed-up |\n|---|---|---|---|---|")
    for r in rows:
        frac = f"{r['useful_tokens_frac']:.1%}"
        speedup = f"{r['speedup']:.2f}x of {r['against']}"
        print(f"| {r['layout']} | {frac} | {r['seconds']:.2f} | {r['tokens_per_s']:.0f} | {speedup} |")
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        args.out.write_text(json.dumps({"settings": settings, "p99_over_median": tail, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
