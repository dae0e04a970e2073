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
    "eval_change": {"eval/held_out/avg@3": 0.8, "eval/held_out/avg@3_se": 0.01},
    "eval_after": {"eval/held_out/avg@3": 0.9, "eval/held_out/avg@3_se": 0.03, "eval/held_out/pass@3": 1.0},
}


def test_the_card_of_an_exported_model_has_its_base_its_figures_and_the_whole_config(tmp_path):
    write_card(tmp_path, CONFIG, SUMMARY, resolved(CONFIG))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "owner/base"
    assert card.data.library_name == "transformers"
    assert "gspo" in card.data.tags
    assert "owner/base after 7 steps of GSPO" in card.text
    assert "| held_out/avg@3 | 0.100 ± 0.020 | 0.900 ± 0.030 | +0.800 ± 0.010 |" in card.text
    assert "| held_out/pass@3 |  | 1.000 |  |" in card.text
    assert "highest" not in card.text
    settings = json.loads(card.text.split("```json")[1].split("```")[0])
    assert settings == json.loads(json.dumps(resolved(CONFIG)))


def test_the_card_has_the_best_evaluation_and_what_it_is_with_other_seeds(tmp_path):
    again = {"eval/held_out/avg@3": 0.85, "eval/held_out/avg@3_se": 0.04}
    best = {"figure": "held_out/avg@3", "step": 4, "value": 0.95, "model": "best/step-000004"}
    for more, shown in (({}, "at step 4."), ({"again": again}, "at step 4; with other seeds: 0.850 ± 0.040.")):
        write_card(tmp_path, CONFIG, SUMMARY | {"best": best | more, "steps": 4}, {})
        text = ModelCard.load(tmp_path / "README.md").text
        assert f"The highest held_out/avg@3 was 0.950, {shown}" in text
        assert "owner/base after 4 steps of GSPO" in text


def test_a_folder_is_no_base_model_of_the_hub(tmp_path):
    write_card(tmp_path, replace(CONFIG, model="models/mine"), SUMMARY, {})
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None
