"""What is the effect of each of the four fixes of vLLM V0 -> V1? All four on, then each one off, in numbers and curves.

    python scripts/four_fixes/four_fixes.py                  # 20 to 35 minutes on two cores
    python scripts/four_fixes/four_fixes.py --static-only    # without the learning curves: 6 minutes

Part A compares engine and trainer across one weight update; part B runs the real loop for some steps. Writes OUT (JSON)
and the curves as PNG next to it.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from fixes_learning import learn
from fixes_static import OBJECTIVES, Number, prompts_and_policies, static

from rollout.settings import engine_env
from trainer.machine import cores
from trainer.runs.settings import stack_versions

ROOT = Path(__file__).resolve().parents[2]
SHOWN = {
    "actor/clip_frac": "clip fraction",
    "rollout_corr/k3_kl": "KL (k3)",
    "actor/entropy": "entropy (nats)",
    "reward/mean": "reward",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One fix off (or none), and the number that this fix changes."""

    name: str
    engine: str = "rollout.engine:Engine"
    metric: str = ""
    means: str = ""
    seed: int = 0


SETTINGS = [
    Setting(name="all four on"),
    Setting(
        name="1 off: raw log-probabilities",
        engine="faulty_engines:RawLogprobs",
        metric="mean_d",
        means="mean d",
    ),
    Setting(
        name="2 off: prefixes outlive their weights",
        engine="faulty_engines:UnsaltedPrefixes",
        metric="k3_after",
        means="k3 of replies started after the update",
    ),
    Setting(
        name="3 off: updates abort",
        engine="faulty_engines:AbortingUpdates",
        metric="aborted",
        means="share of requests aborted",
    ),
    Setting(
        name="4 off: bf16 head",
        engine="faulty_engines:ModelDtypeHead",
        metric="k3",
        means="k3",
    ),
]


def effect(on: Number, off: Number) -> float:
    """A difference, divided by its standard error."""
    error = math.hypot(on[1], off[1])
    return (off[0] - on[0]) / error if error else 0.0 if on[0] == off[0] else math.inf


def line(*cells: str) -> str:
    """One row of a markdown table."""
    return "| " + " | ".join(cells) + " |"


def pm(number: Number) -> str:
    """A value and its error."""
    return f"{number[0]:.1e} ± {number[1]:.0e}"


def static_tables(rows: list[dict[str, Any]]) -> str:
    """Two tables: every number of every setting, and for each fix the number that it changes."""
    names = ["setting", "tokens", "mean d ± se", "mean abs d ± se", "k3 ± se", "GSPO clips", "GRPO clips"]
    names += ["ESS token", "ESS sequence", "entropy ± se", "aborted ± se"]
    out = [line(*names), "|" + "---|" * len(names)]
    for r in rows:
        if "error" in r:
            out.append(line(r["setting"], r["error"].splitlines()[0]))
            continue
        n, g = r["numbers"], r["gap"]
        share, entropy = (f"{n[k][0]:.2f} ± {n[k][1]:.2f}" for k in ("aborted", "entropy"))
        clips = [f"{r['clipped'][o]['sequences' if o == 'gspo' else 'tokens']:.1%}" for o in OBJECTIVES]
        ess = [f"{g[k]:.4f}" for k in ("ess_token", "ess_sequence")]
        sizes = [pm(n[k]) for k in ("mean_d", "mean_abs", "k3")]
        out.append(line(r["setting"], str(r["tokens"]), *sizes, *clips, *ess, entropy, share))
    out += ["", line("fix off", "number", "all four on", "off", "standard errors"), "|" + "---|" * 5]
    for s, r in zip(SETTINGS, rows, strict=False):
        if s.metric and "error" not in r:
            on, off = (x["numbers"][s.metric] for x in (rows[0], r))
            out.append(line(s.name, s.means, pm(on), pm(off), f"{effect(on, off):+.1f}"))
    return "\n".join(out)


def learning_table(runs: list[dict[str, Any]]) -> str:
    """Means over the steps after the first, and in brackets the distance from the first run in standard errors.

    The standard error is that of the difference per step, as if steps were independent. aborted: replies that an update
    aborted. crossed: replies that were running during an update and continued. stopped: the update at which the
    framework's check, which is only recorded here, would have ended the run.
    """
    shown = SHOWN | {"reward/whole": "reward of whole replies"}
    out = [line("setting", "steps", *shown.values(), "aborted", "crossed", "stopped"), "|" + "---|" * 10]
    for r in runs:
        rows, cells = r["curves"][1:], []
        for name in shown:
            values = [row[name] for row in rows if name in row]
            pairs = [(a[name], b[name]) for a, b in zip(rows, runs[0]["curves"][1:], strict=False) if name in a]
            apart = torch.tensor([a - b for a, b in pairs])
            z = effect((0.0, 0.0), (float(apart.mean()), float(apart.std() / len(pairs) ** 0.5)))
            own = math.hypot(*(row.get(f"{name}_se", math.nan) for row in rows if name in row)) / max(len(values), 1)
            error = "" if math.isnan(own) else f" ± {own:.1g}"
            cells.append(f"{fmean(values or [math.nan]):.2g}{error}" + (f" ({z:+.1f})" if r is not runs[0] else ""))
        flight = [f"{fmean(row[k] for row in rows):.0%}" if rows else "" for k in ("aborted", "crossed")]
        check = f"at update {r['refusals'][0]['version']}" if r["refusals"] else "no"
        ended = f": {r['error'].splitlines()[0]}" if r["error"] else ""
        out.append(line(r["setting"], f"{len(r['curves'])}{ended}", *cells, *flight, check))
    return "\n".join(out)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Four panels, one line per run; bands are one standard error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for axis, (name, label) in zip(axes.flat, SHOWN.items(), strict=True):
        for i, r in enumerate(runs):
            x, y = ([row[k] for row in r["curves"]] for k in ("step", name))
            style = {"color": "0.55", "linestyle": "--"} if r["seed"] else {"color": f"C{i}"}
            ended = f", ended after step {len(x)}" if r["error"] else ""
            axis.plot(x, y, marker=".", label=r["setting"] + ended, linewidth=2.5 if i == 0 else 1.5, **style)
            error = [row.get(f"{name}_se", 0.0) for row in r["curves"]]
            low, high = ([a + s * b for a, b in zip(y, error, strict=True)] for s in (-1, 1))
            axis.fill_between(x, low, high, alpha=0.15, color=style["color"], linewidth=0)
        axis.set_title(label)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    kl = axes.flat[list(SHOWN).index("rollout_corr/k3_kl")]
    kl.set_yscale("log")
    kl.set_ylim(bottom=5e-5)
    kl.set_title("KL (k3); below 1e-10 at step 1 where not shown")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(out: Path, steps: int) -> None:
    """Print the tables; save their numbers and the plot."""
    os.environ.update(engine_env(device="cpu", backend="gloo", threads=cores()))
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", HF_HUB_DISABLE_PROGRESS_BARS="1")
    began = time.perf_counter()
    result: dict[str, Any] = {"stack": stack_versions(), "static": [], "learning": []}

    def log(text: str) -> None:
        print(f"[{time.perf_counter() - began:.0f} s] {text}", file=sys.stderr, flush=True)

    prompts, old, new = prompts_and_policies()
    for setting in SETTINGS:
        log(f"across an update: {setting.name}")
        try:
            row = static(setting.engine, old, new, prompts)
        except Exception as error:  # an engine without its fix may fail in any way, which is a result
            row = {"error": f"{type(error).__name__}: {error}"}
        result["static"].append({"setting": setting.name} | row)
    print(static_tables(result["static"]), flush=True)
    del old, new
    for setting in [*SETTINGS, replace(SETTINGS[0], name="all four on, another seed", seed=1)] if steps else []:
        log(f"learning: {setting.name}")
        with tempfile.TemporaryDirectory() as folder:
            run = learn(setting.engine, setting.seed, steps, Path(folder))
        result["learning"].append({"setting": setting.name} | run)
    if steps:
        print("\n" + learning_table(result["learning"]), flush=True)
        plot(result["learning"], out.with_suffix(".png"))
    result["seconds"] = time.perf_counter() - began
    out.write_text(json.dumps(result, indent=1) + "\n")
    log(f"done; the numbers are in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "data" / "four_fixes.json", help="JSON file")
    parser.add_argument("--steps", type=int, default=10, help="steps of each run of part B (default: 10)")
    parser.add_argument("--static-only", action="store_true", help="without part B")
    arguments = parser.parse_args()
    main(arguments.out, 0 if arguments.static_only else arguments.steps)
