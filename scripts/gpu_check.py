"""Does the stack work on this GPU? Kernels, log-probability parity, weight updates, a whole run, and their speed.

    scripts/gpu_check                   # one Hopper GPU, no network, below 8 minutes; --device cpu tries the script
    scripts/gpu_check --only engines update
    scripts/gpu_check --side-by-side    # all phases at the same time: three times sooner, and speeds do not count

Each phase runs in its own process, so a crash or a hang ends only that phase. The result is gpu_check.json (in $OUT if
it is set; phases that are run again replace their part) and a table. The exit status is 1 if any phase failed.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rollout.settings import engine_env
from trainer.machine import cores

ROOT = Path(__file__).resolve().parent.parent
PHASES = {"facts": 60, "kernels": 150, "learner": 120, "engines": 200, "update": 180, "loop": 180, "speed": 240}
PHASES |= {"sleep": 180, "nccl": 200}
"""Seconds that each may take. Phase NAME is the function NAME of scripts/gpu/NAME.py."""


def run_phase(args: argparse.Namespace) -> None:
    """Run in the phase's own process: write its result or its error to --result."""
    try:
        result = getattr(importlib.import_module(f"gpu.{args.phase}"), args.phase)(args)
        problems = result.pop("problems", [])
        found = {"ok": not problems, "error": "; ".join(problems), "result": result}
    except BaseException as error:
        traceback.print_exc()
        found = {"ok": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    Path(args.result).write_text(json.dumps(found))
    sys.exit(0 if found["ok"] else 1)


def supervise(name: str, arguments: list[str], work: str, limit: float) -> dict[str, Any]:
    """Run one phase in its own process group; at its time limit, end it with every process that it started."""
    result, reached = (Path(work) / f"{name}.{kind}" for kind in ("json", "reached"))
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "UNISON_GPU_CHECK": f"{os.getpid()} {name}"}
    # Images set it, and each process would then compile vLLM's and torch's sources again, for half a minute.
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    cpu = "cpu" in arguments
    if name in ("engines", "speed"):  # the other phases' engines get it from the cluster
        environ |= engine_env(device="cpu" if cpu else "cuda", backend="gloo" if cpu else "ipc", threads=cores())
        environ["VLLM_LOGGING_LEVEL"] = "INFO"  # names the model runner, the attention and the seconds of each part
    environ["PYTHONPATH"] = os.pathsep.join(
        p for p in (str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH")) if p
    )
    command = [sys.executable, __file__, *arguments, "--phase", name, "--result", str(result), "--work", work]
    print(f"== {name} (at most {limit:.0f} s)", flush=True)
    began = time.perf_counter()
    child = subprocess.Popen(command, env=environ, cwd=work, start_new_session=True)
    found: dict[str, Any] = {"ok": False}
    try:
        child.wait(timeout=limit)
        found["error"] = f"exit status {child.returncode} and no result"
        found = json.loads(result.read_text()) if result.exists() else found
    except subprocess.TimeoutExpired:
        last = reached.read_text() if reached.exists() else "it had begun"
        found["error"] = f"still running after {limit:.0f} s; the last that it reports: {last}"
    finally:
        for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 0)):  # Ray and vLLM clean up after the first
            if child.poll() is None:
                os.killpg(child.pid, number)
                time.sleep(patience)
    found["seconds"] = time.perf_counter() - began
    print(f"== {name}: {'ok' if found['ok'] else 'FAILED'} in {found['seconds']:.1f} s", flush=True)
    return found


def closing_table(phases: dict[str, Any]) -> str:
    """All results as text."""
    lines = []
    for name, found in phases.items():
        lines.append(f"{name:13s}{'ok' if found['ok'] else 'FAILED':8s}{found['seconds']:.1f} s  {found['error']}")
        for key, value in found.get("result", {}).items():
            if key == "rows" and value:
                table = [
                    list(value[0]),
                    *([x if isinstance(x, str) else f"{x:.3g}" for x in r.values()] for r in value),
                ]
                lines += ["  " + "".join(f"{x:>12s}" for x in row) for row in table]
            else:
                spread = isinstance(value, dict) and "median" in value
                lines.append(
                    f"  {key}: " + ("{median:.4g} ({min:.4g} to {max:.4g})".format(**value) if spread else f"{value}")
                )
    return "\n".join(lines)


def main() -> None:
    """Run the phases in sequence, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--model", default="", help="folder of a model for the parity table (default: a random model)")
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES), help="run only these phases")
    parser.add_argument(
        "--output", default=str(Path(os.environ.get("OUT", ".")) / "gpu_check.json"), help="JSON to write"
    )
    parser.add_argument(
        "--limit", type=float, default=470, help="seconds in all, on CPU three times as many (default: 470)"
    )
    parser.add_argument("--side-by-side", action="store_true", help="run the phases at the same time")
    parser.add_argument("--keep", default="", help="folder for the files of the runs (default: they are removed)")
    for internal in ("--phase", "--result", "--work"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.patience = 1 if args.device == "cuda" else 3  # a laptop's cores are slow, and it is paid for already
    if args.phase:
        run_phase(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # lets `supervise` end its phase
    model, keep = (str(Path(folder).resolve()) if folder else "" for folder in (args.model, args.keep))
    arguments = ["--device", args.device, "--model", model, "--keep", keep]
    arguments += ["--side-by-side"] if args.side_by_side else []
    output = Path(args.output)
    phases = json.loads(output.read_text())["phases"] if output.exists() else {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as work, ThreadPoolExecutor(len(PHASES)) as pool:

        def one(name: str) -> None:
            left = args.patience * args.limit - (time.perf_counter() - began)
            phases[name] = supervise(name, arguments, work, max(5.0, min(args.patience * PHASES[name], left)))
            report = {"device": args.device, "seconds": time.perf_counter() - began, "phases": phases}
            output.write_text(json.dumps(report, indent=2) + "\n")

        for _ in pool.map(one, args.only) if args.side_by_side else map(one, args.only):
            pass
    print(closing_table(phases), f"{time.perf_counter() - began:.0f} s in all; {output}", sep="\n")
    sys.exit(0 if all(found["ok"] for found in phases.values()) else 1)


if __name__ == "__main__":
    main()
