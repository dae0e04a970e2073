"""The look-ups of recipes/lookup.py with native tool calls: Qwen3-0.6B on one GPU, calls read by vLLM's parser.

    python recipes/lookup_qwen.py

Hardware: one GPU of 40 GB or more, and the hub or its local cache for the model. Not yet run on GPUs.
"""

from dataclasses import replace
from functools import partial

from lookup import Lookup, questions
from lookup import config as in_text

from rl.config import RolloutConfig, TrainerConfig
from trainer.launch import launch

ASKED = "Which colour has the shelf of order {}? Look the numbers up, and answer with the colour alone."

config = replace(
    in_text,
    name="lookup_qwen",
    model="Qwen/Qwen3-0.6B",
    # The chat template shows the tool: no worked example is needed.
    data=partial(questions, worked=[], asked=ASKED),
    env=Lookup,
    chat_template_kwargs={"enable_thinking": False},
    share_gpu=True,
    steps=50,
    eval_every=10,
    keep_best="held_out/avg@4",
    dtype="bfloat16",
    rollout=RolloutConfig(tool_parser="hermes", max_tokens=128, max_model_len=1024, gpu_memory_utilization=0.4),
    trainer=TrainerConfig(lr=1e-6, gradient_checkpointing=True),
)

if __name__ == "__main__":
    launch(config)
