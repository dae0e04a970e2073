"""A tiny reward model: a random classifier with one output, on the characters of `make_model`."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from models import make_model

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"


def make_reward_model(folder: Path, *, chat_template: str | None = TEMPLATE, labels: int = 1) -> PreTrainedModel:
    """Write it to a folder. Its scores are far from 0, where a sigmoid is flat."""
    make_model(folder, chat_template=chat_template)
    config = AutoConfig.from_pretrained(folder, num_labels=labels)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        model.score.weight.mul_(100)
    model.save_pretrained(folder)
    return model
