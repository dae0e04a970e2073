"""What does the README.md of an exported model contain? Its start model, settings and evaluations."""

import json
import math
from pathlib import Path
from typing import Any

from rl.config import Config
from trainer.model.files import looks_local


def write_card(folder: Path, config: Config, summary: dict[str, Any], settings: dict[str, Any]) -> None:
    """A model card of the Hugging Face hub, with the run's whole config (`settings`) and its evaluations."""
    from huggingface_hub import ModelCard, ModelCardData

    objective = type(config.objective).__name__
    metadata = ModelCardData(
        base_model=None if looks_local(config.model) else config.model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["reinforcement-learning", objective.lower(), "unison-rl"],
    )
    evaluations = "\n".join(
        f"| {name.removeprefix('eval/')} | {_of(summary['eval_before'], name)} | {_of(summary['eval_after'], name)} "
        f"| {_of(summary.get('eval_change', {}), name, '+')} |"
        for name in summary["eval_after"]
        if not name.endswith("_se")
    )
    stack = ", ".join(f"{name} {version}" for name, version in summary["stack"].items())
    ModelCard(f"""---
{metadata.to_yaml()}
---

# {config.name}

{config.model} after {summary.get("steps", config.steps)} steps of {objective} with unison-rl, in {config.dtype}
(config digest {summary["config_digest"]}).

| evaluation | before | after | paired difference |
|---|---|---|---|
{evaluations}
{_best(summary.get("best"))}
Made with {stack}.

```json
{json.dumps(settings, indent=1)}
```
""").save(folder / "README.md")


def _best(best: dict[str, Any] | None) -> str:
    if not best:
        return ""
    name = f"eval/{best['figure']}"
    again = f"; with other seeds: {_of(best['again'], name)}" if "again" in best else ""
    return f"\nThe highest {best['figure']} was {best['value']:.3f}, at step {best['step']}{again}.\n"


def _of(evaluation: dict[str, float], name: str, sign: str = "") -> str:
    value, error = evaluation.get(name), evaluation.get(f"{name}_se")
    known = error is not None and math.isfinite(error)
    return "" if value is None else f"{value:{sign}.3f}" + (f" ± {error:.3f}" if known else "")
