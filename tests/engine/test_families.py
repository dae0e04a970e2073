"""Each model family through the whole framework: docs/models.md shows the same numbers."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cases import nightly_unless
from family import PROMPTS, family_gaps
from live import engine_config
from models import FAMILIES, make_model
from pair import Pair, examiner, make_learner

GAPS = ("trainer", "engine", "update", "export", "reload", "lora")


@pytest.mark.parametrize("name", nightly_unless(lambda name: name == "Gemma-2", FAMILIES))
def test_trainer_engine_update_export_and_adapters_of_a_family_agree(name: str, live: Callable, tmp_path: Path) -> None:
    found = family_gaps(make_model(tmp_path / "model", **FAMILIES[name]), tmp_path, live)
    assert {step: gap for step, gap in found.items() if step in GAPS and gap > 1e-5} == {}


def test_a_reply_ends_at_every_stop_id_and_the_doctor_finds_nothing(live: Callable, tmp_path: Path) -> None:
    model = make_model(tmp_path, stops=[1, 3], peak=2.0)
    # The config names a third, which generation_config leaves out.
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 40}))
    settings = engine_config(model)
    engine = live(settings, version=-1, load_format="dummy")
    pair = Pair(settings, engine, make_learner(settings))
    check = asyncio.run(examiner(pair, ["12+34=", "5*6=", "789", "a"]).examine(0))
    assert [str(f) for f in check.findings] == []
    assert check.evidence.driver_facts["stop_ids"] == [1, 3, 40]
    done = [c for seed in range(4) for c in engine.sample(PROMPTS[1], 32, seed=100 * seed, max_tokens=64)]
    ends = {c.token_ids[-1] for c in done if c.finish_reason == "stop"}
    assert ends == {1, 3, 40}
    assert not {1, 3, 40} & {token for c in done for token in c.token_ids[:-1]}
