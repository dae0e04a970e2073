"""What does a run leave behind, however it ends? The model, summary.json, curves.png and the closing table."""

import asyncio
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.config import Config
from rl.protocols import StallError
from rl.typed import shortened
from trainer.cluster.cluster import Cluster
from trainer.model.files import copy_companions
from trainer.pages.curves import plot
from trainer.runs import checkpoint
from trainer.runs.files import Reserve, without_nan, write_json
from trainer.runs.model_card import write_card
from trainer.tracking.terminal import as_typed, closing_table, console
from trainer.tracking.tracker import RunTracker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


async def export_model(
    cluster: Cluster,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    config: Config,
    summary: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Write the trained model into the run's `folder` as `model`, whole or not at all.

    Raises OSError that names the checkpoint which holds the weights.
    """
    try:
        await write_model(cluster, tokenizer, folder / "model", config, summary, settings)
    except OSError as error:
        saved = checkpoint.finished(folder / "checkpoints")
        holds = f"The trained weights are in {saved[-1]}" if saved else "No checkpoint holds the weights (save_every=0)"
        raise OSError(
            f"{error}. {holds}. Make space, then export it with: {how_to_resume(folder) or 'a new run'}"
        ) from error


async def write_model(
    cluster: Cluster,
    tokenizer: "PreTrainedTokenizerBase",
    final: Path,
    config: Config,
    summary: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Write the learner's model as the folder `final`, whole or not at all. Raises OSError."""
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)

    def add_files() -> None:
        copy_companions(config.model, tokenizer, partial)
        write_card(partial, config, summary, settings)

    try:
        final.parent.mkdir(exist_ok=True)
        target = str(partial.resolve())
        await cluster.ask_learners(lambda rank: rank.export(target))
        await asyncio.to_thread(add_files)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except StallError:
        raise
    except Exception as error:  # safetensors, tokenizers and the hub's library each have errors of their own
        shutil.rmtree(partial, ignore_errors=True)
        kind = type(error).__name__
        raise OSError(f"the model could not be exported to {final} ({kind}: {shortened(str(error), 300)})") from error


def how_to_resume(folder: Path) -> str | None:
    """The command, once there is a checkpoint to resume from."""
    if not checkpoint.finished(folder / "checkpoints"):
        return None
    return shlex.join([as_typed(Path(sys.executable)), sys.argv[0], "--resume", str(folder)])


def leave(folder: Path, summary: dict[str, Any], tracker: RunTracker, reserve: Reserve) -> None:
    """Write what is known of a run. What cannot be written or drawn is reported, and keeps nothing else away."""
    reserve.free()
    alerts = len(tracker.alerts)
    _write(folder, summary)
    tracker.write_waiting()
    if summary["steps"]:
        try:
            plot(tracker.history, folder / "curves.png", summary["name"], tracker.alerts)
        except Exception as error:  # matplotlib may lack a home, a font, memory or space
            text = f"{type(error).__name__}: {shortened(str(error), 300)}. The numbers are in metrics.jsonl."
            tracker.alert(summary["steps"], "curves.png cannot be drawn", text)
    tracker.close(summary)
    if len(tracker.alerts) != alerts:
        _write(folder, summary | {"alerts": len(tracker.alerts)})
    closing_table(summary, folder)


def _write(folder: Path, summary: dict[str, Any]) -> None:
    try:
        write_json(folder / "summary.json", summary)
    except OSError as error:
        console.print(f"summary.json cannot be written ({error}); it would be:", style="bold red", markup=False)
        console.print(json.dumps(without_nan(summary)), markup=False, highlight=False)
