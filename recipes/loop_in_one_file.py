"""The whole RL loop in one file, for reading: sample, score, batch, learn, and the new weights sample again.

    python recipes/loop_in_one_file.py --steps 8                  # some 20 s of one CPU core per step

One process, one Hugging Face model as sampler and as learner, no Ray, no vLLM, no DeepSpeed. Everything from `rl` is
what a real run uses: the types, the batch, the objective, the loss and its average. A real run differs in three points:
vLLM samples, DeepSpeed ranks learn, and the two may work at the same time (`max_staleness` above 0).
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl.batch import collate, take, trajectory
from rl.loop.stream import stream
from rl.loss import full_loss, prepare
from rl.objectives import GRPO, Objective
from rl.objectives.corrections import Uncorrected
from rl.parity.mismatch import finish
from rl.reduce import Meter, Totals, loss_weights
from rl.rewards.score import Reward, score
from rl.types import Batch, Completion, PolicyOutput, Prompt, Reply, Trajectory


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What this loop can vary. `rl.config.Config` has the same names."""

    model: str = "models/smollm2-135m"
    objective: Objective = GRPO()
    steps: int = 8
    prompts_per_step: int = 4
    group_size: int = 8
    max_tokens: int = 8
    temperature: float = 1.0
    lr: float = 1e-5
    micro_batch_rows: int = 8
    seed: int = 0


# -- the task ----------------------------------------------------------------------------------------------------------


def questions(tokenizer: Any) -> list[Prompt]:
    """Sums of two digits, as tokens. `task` travels with the prompt to the reward."""
    texts = {f"2 + 3 = 5\n4 + 1 = 5\n{a} + {b} =": str(a + b) for a in range(1, 10) for b in range(1, 10)}
    return [
        Prompt(ordinal=i, token_ids=tokenizer.encode(text, add_special_tokens=False), task={"answer": answer})
        for i, (text, answer) in enumerate(texts.items())
    ]


def first_integer_is_right(reply: Reply) -> float:
    """1 if the first integer of the reply is the sum, else 0."""
    found = re.search(r"\d+", reply.text)
    return float(found is not None and found[0] == reply.task["answer"])


# -- sample ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model: Any, prompt: Prompt, s: Settings, *, eos: int | None, version: int) -> list[Completion]:
    """A group: `group_size` completions of one prompt, each token with the log-probability it was sampled with."""
    ids = torch.tensor([prompt.token_ids] * s.group_size)
    tokens, logprobs, cache = [], [], None
    for _ in range(s.max_tokens):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        # The distribution that we sample from, after the temperature: the loss must use the same one.
        logprobs_all = (out.logits[:, -1].float() / s.temperature).log_softmax(dim=-1)
        ids = torch.multinomial(logprobs_all.exp(), num_samples=1)
        tokens.append(ids)
        logprobs.append(logprobs_all.gather(1, ids))
    rows = zip(torch.cat(tokens, dim=1).tolist(), torch.cat(logprobs, dim=1).tolist(), strict=True)
    return [completion(ids, numbers, eos, version) for ids, numbers in rows]


def completion(tokens: list[int], logprobs: list[float], eos: int | None, version: int) -> Completion:
    """One completion up to its end-of-sequence token, which is part of it: the policy chose to stop."""
    length = tokens.index(eos) + 1 if eos in tokens else len(tokens)
    return Completion(
        token_ids=tokens[:length],
        logprobs=logprobs[:length],
        versions=[version] * length,
        finish_reason="stop" if eos in tokens else "length",
    )


# -- score -------------------------------------------------------------------------------------------------------------


def scored(prompt: Prompt, completions: list[Completion], reward: Reward, tokenizer: Any) -> list[Trajectory]:
    """Each completion with its reward, as one flat sequence. A reward that raises is an error that names the prompt."""
    group = []
    for c in completions:
        text = tokenizer.decode(c.token_ids, skip_special_tokens=True)
        reply = Reply(text=text, finished=c.finish_reason == "stop", task=prompt.task, token_ids=c.token_ids)
        paid, parts = score(reward, reply, prompt.ordinal)
        if paid is not None:  # a sample to which the reward does not apply counts nowhere
            group.append(trajectory(prompt, c, paid, parts))
    return group


# -- learn -------------------------------------------------------------------------------------------------------------


def policy_output(model: Any, batch: Batch, temperature: float) -> PolicyOutput:
    """What the current policy assigns to every token, [B, T].

    Rows are padded on the right, and attention is causal, so no attention mask is needed.
    """
    logprobs_all = (model(batch.input_ids[:, :-1]).logits.float() / temperature).log_softmax(dim=-1)
    logprobs = logprobs_all.gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
    return PolicyOutput(logprobs=logprobs, entropy=-(logprobs_all.exp() * logprobs_all).sum(dim=-1))


def learn(model: Any, optimizer: torch.optim.Optimizer, batch: Batch, s: Settings) -> dict[str, float]:
    """One optimizer step on one batch. Returns the step's metrics."""
    # Advantages compare rows, so they are made once, from the whole step.
    batch, advantages = prepare(s.objective, batch)
    totals = Totals(tokens=int(batch.mask.sum()), sequences=len(batch.rewards), horizon=s.max_tokens)
    meter, loss_of_step = Meter(), 0.0
    for rows in torch.arange(len(batch.rewards)).split(s.micro_batch_rows):
        part = take(batch, rows)
        policy = policy_output(model, part, s.temperature)
        # Without old_logprobs the current policy is the old one, which is exact in the first step of a batch.
        loss, metrics = full_loss(s.objective, Uncorrected(), policy, part, advantages[rows, : part.mask.shape[1]])
        # The denominators belong to the whole step, so the micro-batches add up to the same loss however they are cut.
        weights = loss_weights(part.mask, s.objective.average_over, totals)
        total = torch.where(part.mask, loss * weights, 0.0).sum()
        total.backward()
        loss_of_step += float(total.detach())
        meter.add(metrics, part.mask)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    return {"actor/loss": loss_of_step, "actor/grad_norm": float(norm), **finish(meter.means())}


# -- the loop ----------------------------------------------------------------------------------------------------------


def train(s: Settings) -> Iterator[dict[str, float]]:
    """Sample, score, batch, learn; yields the metrics of each step."""
    torch.manual_seed(s.seed)
    tokenizer = AutoTokenizer.from_pretrained(s.model)
    model = AutoModelForCausalLM.from_pretrained(s.model, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, betas=(0.9, 0.95), weight_decay=0.0)
    prompts = stream(questions(tokenizer), s.seed)
    for version in range(s.steps):
        trajectories: list[Trajectory] = []
        for _ in range(s.prompts_per_step):
            prompt = next(prompts)
            group = sample(model, prompt, s, eos=tokenizer.eos_token_id, version=version)
            trajectories += scored(prompt, group, first_integer_is_right, tokenizer)
        metrics = learn(model, optimizer, collate(trajectories), s)
        # Publishing is free here: the sampler is the same model. Its weights are now version + 1.
        rewards = [t.reward for t in trajectories]
        yield {"step": version + 1.0, "reward/mean": sum(rewards) / len(rewards), **metrics}


def main() -> None:
    """One line per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=Settings.model, help="folder or hub name")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    arguments = parser.parse_args()
    for metrics in train(Settings(model=arguments.model, steps=arguments.steps, seed=arguments.seed)):
        print(
            f"step {metrics['step']:.0f}/{arguments.steps}  reward {metrics['reward/mean']:.3f}  "
            f"entropy {metrics['actor/entropy']:.2f}  gradient {metrics['actor/grad_norm']:.2f}  "
            f"gap sampler to learner {metrics['rollout_corr/logprob_abs_diff_mean']:.1e} nats",
            flush=True,
        )


if __name__ == "__main__":
    main()
