"""What did a run achieve? The part of summary.json that follows from its history and its ledger."""

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from rl.typed import shortened

MOST = 2000
"""Characters of an error's message."""


def summarise(
    history: Sequence[dict[str, float]],
    *,
    tokens: int,
    weight_version: int,
    ledger: dict[str, int],
    alerts: int,
    engines_lost: list[str],
    resume: str | None,
) -> dict[str, Any]:
    """The fields of summary.json about the steps that were taken.

    `history` are the rows of metrics.jsonl, evaluations without a step among them; `tokens` are those trained on;
    `ledger` counts prompts by state; `engines_lost` has a cause for each loss; `resume` is the command that continues
    the run, None where there is none. The worst gap is in nats, and NaN counts as worse than every number.
    """
    steps = [row for row in history if "reward/mean" in row]
    gaps = [row["rollout_corr/logprob_abs_diff_mean"] for row in steps]
    return {
        "steps": len(steps),
        "tokens": tokens,
        "weight_version": weight_version,
        "resume": resume,
        "engines_lost": engines_lost,
        "ledger": ledger,
        "reward_first": steps[0]["reward/mean"] if steps else None,
        "reward_last": steps[-1]["reward/mean"] if steps else None,
        "alerts": alerts,
        "worst_logprob_gap": max(gaps, key=lambda gap: (math.isnan(gap), gap), default=None),
    }


def ending(error: BaseException | None, *, logs: str) -> dict[str, Any]:
    """The fields about an error that ended the run: none without one. `logs` is the folder of the actors' logs."""
    if error is None:
        return {}
    if isinstance(error, asyncio.CancelledError | KeyboardInterrupt):
        return {"status": "interrupted"}
    return {"error": f"{type(error).__name__}: {shortened(str(error), MOST)}", "logs": logs}
