"""Measure every model family, and write docs/models.md.

Usage: .venv/bin/python scripts/docs/models.py            (about five minutes on two cores)

Each family is a tiny random model that goes through the whole framework with a real vLLM engine on CPU: see
tests/support/family.py. The figures are kept in docs/data/models.json.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
DATA, PAGE = ROOT / "docs" / "data" / "models.json", ROOT / "docs" / "models.md"
STEPS = {
    "trainer": "trainer",
    "engine": "engine",
    "update": "update",
    "export": "export",
    "reload": "reload",
    "lora": "LoRA",
}
HEAD = """# Models

<!-- Written by scripts/docs/models.py; the figures are in docs/data/models.json. -->

Any causal language model that transformers and vLLM both load can be tried. At start the learner compares its
log-probabilities with the model's own forward pass on short random sequences, and refuses the model, with the size of
the difference and its likely cause, if they are not equal. What a model does to its logits after the lm_head (a scale,
a soft cap) is measured on its own forward call, so no family is named in the code for that.

The families below were measured on CPU, in fp32, at T = 0.7, as tiny random models (two layers, 128 features), each
with a real vLLM engine:

    .venv/bin/python scripts/docs/models.py

Every figure is the largest difference of a token's log-probability, in nats.

- **rows**: `packed` rows have no padding and share a group's prompt; `padded` rows are slower and equally exact.
- **trainer**: trainer and transformers' own logits.
- **engine**: trainer and vLLM, on what vLLM sampled after the first weight update.
- **update**: the same after all weights were changed and sent again.
- **export**: the exported folder in transformers. **reload**: the same folder in vLLM.
- **LoRA**: trainer and vLLM after an update with random adapters, merged.

"""
TAIL = """
Not measured here: models above 135M parameters, bf16 (see [the doctor](parity.md), which checks each run), and GPUs.

- A reply ends at every token that the tokenizer (EOS), generation_config.json or config.json names.
- The exported folder has all files of the base model besides weights and config (generation_config, tokenizer, chat
  template, processor), copied as they are.
- Models with a soft cap in attention (Gemma-2) run transformers' eager attention, whose memory grows with the square of
  the row's length.
- LoRA adapts linear layers; stacked experts stay frozen.
- Routers of Qwen3-MoE, Qwen2-MoE, OLMoE and Mixtral can replay the engine's experts:
  [mixture of experts](how-to/mixture-of-experts.md).
"""


def main() -> None:
    """Measure, or only write the page from the stored figures with `--page`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="measure nothing: the page from the stored figures")
    if not parser.parse_args().page:
        DATA.write_text(json.dumps(measured(), indent=1) + "\n")
    PAGE.write_text(page(json.loads(DATA.read_text())))


def measured() -> dict[str, dict[str, float | str]]:
    """The figures of every family; a refusal is its message."""
    from family import family_gaps
    from live import Live
    from models import FAMILIES, make_model

    found = {}
    for name, how in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[name] = family_gaps(make_model(Path(folder, "model"), **how), Path(folder), Live)
            except ValueError as refusal:
                found[name] = {"refused": str(refusal)}
        print(name, found[name], flush=True)
    return found


def page(found: dict[str, dict[str, float | str]]) -> str:
    """The page of these figures."""
    lines = [f"| model | rows | {' | '.join(STEPS.values())} |", f"|---|---|{'---|' * len(STEPS)}"]
    for name, row in found.items():
        cells = [cell(row.get(step, "-")) for step in STEPS]
        lines.append(f"| {name} | {row.get('rows', row.get('refused'))} | {' | '.join(cells)} |")
    return HEAD + "\n".join(lines) + "\n" + TAIL


def cell(value: float | str) -> str:
    """A figure, or that it was refused."""
    return f"{value:.0e}" if isinstance(value, float) else "refused" if len(value) > 1 else value


if __name__ == "__main__":
    main()
