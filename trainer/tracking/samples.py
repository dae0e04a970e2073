"""Which replies are worth a look? The shortest, the longest, the worst gap, and one random group of each step."""

import math
import random
from collections.abc import Callable, Sequence

from rl.types import Trajectory

Decode = Callable[[list[int]], str]
MOST = 4000
"""Characters of one text in a table."""


def sampled(t: Trajectory) -> int:
    """Tokens of a row that the policy sampled."""
    return sum(t.mask)


def parts(t: Trajectory) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of the reply; what an episode read between its turns stays between them."""
    first = t.mask.index(True) if True in t.mask else len(t.mask)
    return [*t.token_ids[:first]], [*t.token_ids[first:]]


def worth_a_look(
    step: int, trajectories: Sequence[Trajectory], decode: Decode, gaps: Sequence[float] = ()
) -> list[dict[str, str]]:
    """Rows of a table, all texts: random rows alone would hide the bad ones.

    `gaps` has the largest |trainer - engine| of each row in nats, NaN where it is not known, or is empty.
    """
    if not trajectories:
        return []
    order = range(len(trajectories))
    lengths = [sampled(t) for t in trajectories]
    chosen = [("shortest", min(order, key=lengths.__getitem__)), ("longest", max(order, key=lengths.__getitem__))]
    if known := [i for i in order if gaps and not math.isnan(gaps[i])]:
        chosen.append(("worst gap", max(known, key=gaps.__getitem__)))
    groups = sorted({t.group for t in trajectories})
    group = random.Random(step).choice(groups)
    chosen += [("group", i) for i in order if trajectories[i].group == group]
    return [
        {
            "step": str(step),
            "why": why,
            "prompt": decode(parts(trajectories[i])[0])[-MOST:],
            "reply": decode(parts(trajectories[i])[1])[:MOST],
            "reward": f"{trajectories[i].reward:.6g}",
            "tokens": str(lengths[i]),
            "ended": trajectories[i].finish_reason,
            "group": str(trajectories[i].group),
            "gap": f"{gaps[i]:.3g}" if gaps else "",
        }
        for why, i in chosen
    ]


def histograms(step: int, trajectories: Sequence[Trajectory], gaps: Sequence[float] = ()) -> dict[str, list[float]]:
    """Of the rows of a step: the age of the oldest token in weight versions, sampled tokens, and the largest gap."""
    versions = [[v for v, m in zip(t.versions, t.mask, strict=True) if m] for t in trajectories]
    found = {
        "histogram/age": [float(step - 1 - min(of)) for of in versions if of],
        "histogram/length": [float(sampled(t)) for t in trajectories],
        "histogram/gap": [float(gap) for gap in gaps if math.isfinite(gap)],
    }
    return {name: values for name, values in found.items() if values}
