"""An exported model says what it is."""

import json
from dataclasses import replace

from huggingface_hub import ModelCard

from rl.config import Config
from rl.objectives import GSPO
from rl.types import Data
from trainer.runs.model_card import write_card
from trainer.runs.settings import resolved

CONFIG = Config(
    name="half",
    model="owner/base",
    data=lambda: Data(train=[]),
    reward=lambda reply: 0.0,
    objective=GSPO(),
    steps=7,
)
SUMMARY = {
    "config_digest": "0123456789ab",
    "stack": {"torch": "2.13.0"},
    "eval_before": {"eval/held_out/avg@3": 0.1, "eval/held_out/avg@3_se": 0.02},
    "eval_after": {"eval/held_out/avg@3": 0.9, "eval/held_out/avg@3_se": 0.03, "eval/held_out/pass@3": 1.0},
}


def test_the_card_of_an_exported_model_has_its_base_its_figures_and_the_whole_config(tmp_path):
    write_card(tmp_path, CONFIG, SUMMARY, resolved(CONFIG))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "owner/base"
    assert card.data.library_name == "transformers"
    assert "gspo" in card.data.tags
    assert "owner/base after 7 steps of GSPO" in card.text
    assert "| held_out/avg@3 | 0.100 ± 0.020 | 0.900 ± 0.030 |" in card.text
    assert "| held_out/pass@3 |  | 1.000 |" in card.text
    settings = json.loads(card.text.split("```json")[1].split("```")[0])
    assert settings == json.loads(json.dumps(resolved(CONFIG)))


def test_a_folder_is_no_base_model_of_the_hub(tmp_path):
    write_card(tmp_path, replace(CONFIG, model="models/mine"), SUMMARY, {})
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None
