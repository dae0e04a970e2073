"""The quickstart's job on this framework, on TRL, and on an older checkout: seconds until what a user waits for.

    python scripts/bench/side_by_side.py --seeds 0 1 2 --out docs/data/side_by_side.json             # 25 minutes
    python scripts/bench/side_by_side.py --sides here older --older FOLDER --eval-every 6            # a checkout
    python scripts/bench/side_by_side.py --sides here older --older FOLDER --first-step --seeds 0 1 2 3 4 5 6 7 8

TRL's trainer gets the same prompts, reward, sampling and optimizer, and the best of its settings that work on a CPU:
plain `generate`, 16 samples a pass, fused AdamW, no gradient checkpointing, nothing logged or saved. It has no
`eval_samples`; the same 96 replies are sampled with its model's `generate`. Sides take turns, seed by seed. A run that
`--out` has already is not made again; TRL's ends once it has learned. Seconds count from the command."""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SIDES, GOAL, STEPS = ("here", "trl", "older"), 0.7, 12
ACCURACY = "eval/held_out/avg@3"
Row = dict[str, float]


def trl(seed: int, eval_every: int) -> None:
    """Train with TRL; print a row for every step and evaluation."""
    sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]
    import torch
    from datasets import Dataset
    from quickstart import config, last_integer_is_right, products
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rl.types import Reply

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer, data = AutoTokenizer.from_pretrained(config.model, padding_side="left"), products()
    dataset = Dataset.from_list([{"prompt": e.prompt, "answer": e.task["answer"]} for e in data.train])
    longest, batch = config.rollout.max_tokens, config.prompts_per_step * config.group_size

    def scores(ids: list[list[int]], answers: list[str]) -> list[float]:
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        ended = [tokenizer.eos_token_id in one for one in ids]
        replies = [
            Reply(text=text, finished=end, task={"answer": answer}, token_ids=one)
            for text, end, answer, one in zip(texts, ended, answers, ids, strict=True)
        ]
        return [last_integer_is_right(reply) for reply in replies]

    class Evaluated(TrainerCallback):
        """Samples the held-out set as the recipe does."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.on_step_end(args, state, control)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            row: Row = {"step": state.global_step}
            if state.global_step % eval_every == 0:
                held = [e for e in data.evals["held_out"] for _ in range(config.eval_samples)]
                asked = tokenizer.apply_chat_template(
                    [e.prompt for e in held], add_generation_prompt=True, padding=True, return_dict=True,
                    return_tensors="pt",
                )  # fmt: skip
                with torch.no_grad():
                    said = trainer.model.generate(
                        **asked, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=longest
                    )
                ids = said[:, asked["input_ids"].shape[1] :].tolist()
                row[ACCURACY] = statistics.fmean(scores(ids, [e.task["answer"] for e in held]))
            print(json.dumps(row), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=config.model,
            reward_funcs=lambda completion_ids, answer, **_: scores(completion_ids, answer),
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=16,
                gradient_accumulation_steps=batch // 16,
                num_generations=config.group_size,
                max_completion_length=longest,
                temperature=1.0,
                max_steps=STEPS,
                learning_rate=config.trainer.lr,
                lr_scheduler_type="constant",
                adam_beta2=0.95,
                max_grad_norm=1.0,
                optim="adamw_torch_fused",
                beta=0.0,
                epsilon=3e-4,
                epsilon_high=4e-4,
                importance_sampling_level="sequence",
                loss_type="grpo",
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                report_to="none",
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                seed=seed,
                model_init_kwargs={"dtype": torch.float32, "attn_implementation": "sdpa"},
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[Evaluated()],
        )
        trainer.train()


def run(side: str, seed: int, eval_every: int, older: Path | None, first_step: bool = False) -> dict[str, Any]:
    """One run: its rows, each with the second at which it was there, and the seconds of the whole command."""
    checkout = older if side == "older" and older else ROOT
    with tempfile.TemporaryDirectory() as folder:
        recipe = ["recipes/quickstart.py", "--seed", str(seed), "--eval-every", str(eval_every)]
        command = [*recipe, "--name", "bench", "--output-dir", folder]
        if side == "trl":
            command = [__file__, "--side", side, "--seeds", str(seed), "--eval-every", str(eval_every)]
        env = os.environ | {"PYTHONPATH": str(checkout), "TRL_EXPERIMENTAL_SILENCE": "1"}
        if side == "trl":  # as our own processes have it; threads that spin for long cost TRL more
            env |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "4000"}
        told = Path(folder) / ("rows.jsonl" if side == "trl" else "bench/metrics.jsonl")
        began, seen = time.time(), []
        with (Path(folder) / "rows.jsonl").open("w") as out, (Path(folder) / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", *command],
                cwd=checkout,
                env=env,
                stdout=out if side == "trl" else log,
                stderr=log,
            )
            while True:
                ended = process.poll() is not None
                lines = told.read_text().splitlines() if told.exists() else []
                rows = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
                seen += [row | {"seconds": time.time() - began} for row in rows[len(seen) :]]
                if ended:
                    break
                learned = side == "trl" and any(row.get(ACCURACY, 0.0) >= GOAL for row in seen)
                if learned or (first_step and any(row["step"] >= 1 for row in seen)):
                    # Nothing that comes after this is compared. At SIGTERM our own would save a checkpoint first.
                    process.send_signal(signal.SIGTERM if side == "trl" else signal.SIGINT)
                    process.wait()
                    break
                time.sleep(0.1)
        if process.returncode not in (0, -signal.SIGTERM, *([128 + signal.SIGINT] if first_step else [])):
            last = (Path(folder) / "log").read_text()[-2000:]
            raise SystemExit(f"{side}, seed {seed} ended with code {process.returncode}:\n{last}")
        kept = [{k: row[k] for k in ("step", ACCURACY, "seconds") if k in row} for row in seen]
        return {"side": side, "seed": seed, "eval_every": eval_every, "rows": kept, "seconds": time.time() - began}


def figures(found: dict[str, Any]) -> Row:
    """Seconds to the end of the first step, to the first accuracy of `GOAL`, and of the whole run."""
    rows = found["rows"]
    at_goal = [row["seconds"] for row in rows if row.get(ACCURACY, 0.0) >= GOAL]
    return {
        "first step": next(row["seconds"] for row in rows if row["step"] >= 1),
        f"{GOAL} held out": at_goal[0] if at_goal else float("nan"),
        "whole run": found["seconds"] if rows[-1]["step"] == STEPS else float("nan"),
    }


def main() -> None:
    """Make the runs that are missing, and print each side's seconds and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="*", default=["here", "trl"], choices=SIDES, help="default: here trl")
    parser.add_argument("--older", type=Path, help="the checkout of side `older`, with its model in models/")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--first-step", action="store_true", help="end each run after it: more pairs in a quarter hour")
    parser.add_argument("--eval-every", type=int, default=2, help="steps between evaluations (default: 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "side_by_side.json", help="JSON file of all runs")
    parser.add_argument("--side", choices=["trl"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    # A shell's job in the background ignores it, and so would each run.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked.side:
        trl(asked.seeds[0], asked.eval_every)
        return
    saved = json.loads(asked.out.read_text()) if asked.out.exists() else []
    made = {(r["side"], r["seed"], r["eval_every"]): r for r in saved}
    asked.out.parent.mkdir(parents=True, exist_ok=True)

    def of(side: str, seed: int) -> Row:
        return figures(made[side, seed, asked.eval_every])

    for turn, seed in enumerate(asked.seeds):
        for side in asked.sides[:: 1 if turn % 2 else -1]:
            if (side, seed, asked.eval_every) not in made:
                made[side, seed, asked.eval_every] = run(side, seed, asked.eval_every, asked.older, asked.first_step)
                asked.out.write_text(json.dumps([*made.values()], indent=1) + "\n")
            print(f"{side}, seed {seed}:", {k: round(v, 1) for k, v in of(side, seed).items()}, flush=True)
    print("\n| seconds until | " + " | ".join(asked.sides) + " | ratio to the first (smallest to largest) |")
    print("|---" * (len(asked.sides) + 2) + "|")
    for name in ["first step", *([] if asked.first_step else [f"{GOAL} held out", "whole run"])]:
        times = {side: [of(side, seed)[name] for seed in asked.seeds] for side in asked.sides}
        first, last = times[asked.sides[0]], times[asked.sides[-1]]
        ratios = [b / a for a, b in zip(first, last, strict=True)]
        cells = [name, *(f"{statistics.median(times[side]):.0f}" for side in asked.sides)]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
