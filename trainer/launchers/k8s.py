"""A run as a RayJob of KubeRay."""

import re
import shlex
import time
from importlib.metadata import version
from pathlib import Path

from rl import checkout
from trainer.launchers import facts
from trainer.launchers.facts import Facts
from trainer.launchers.mistakes import mistakes

ABOUT = "write a RayJob for KubeRay"
SUBMIT, SUFFIX = ["kubectl", "create", "-f"], "yaml"
SETTINGS = {
    "image": ("", "image with this checkout, set up, at its path"),
    "claim": ("", "ReadWriteMany volume claim for runs and the hub's cache, mounted at /shared"),
    "memory_gib": ("64", "memory of each pod, shared memory included"),
    "cpus": ("8", "CPUs of each pod"),
    "secret": ("", "secret whose keys become environment variables, such as HF_TOKEN"),
    "queue": ("", "queue of Kueue"),
    "attempts": ("3", "attempts after the first"),
}
POD = """workingDir: {checkout}
env: [{{name: HF_HOME, value: /shared/hub}}]
{secret}
resources:
  requests: &amount {{cpu: {cpus}, memory: {memory_gib}Gi{gpus}}}
  limits: *amount
volumeMounts:
  - {{name: shared, mountPath: /shared}}
  - {{name: memory, mountPath: /dev/shm}}"""
VOLUMES = """volumes:
  - {{name: shared, persistentVolumeClaim: {{claimName: {claim}}}}}
  # Counted against the pod's memory.
  - {{name: memory, emptyDir: {{medium: Memory, sizeLimit: {shared}Gi}}}}"""
WORKERS = """    workerGroupSpecs:
      - groupName: workers
        replicas: {count}
        minReplicas: {count}
        maxReplicas: {count}
        rayStartParams: {{}}
        template:
          spec:
            containers:
              - name: ray
                image: {image}
"""


def render(run: Facts, file: Path) -> str:
    """The manifest. Raises ValueError for settings that lack."""
    wanted = run.settings
    for name in ("image", "claim"):
        if not wanted[name]:
            raise ValueError(f"--{name} is needed: {SETTINGS[name][1]}")
    if run.shared_gib >= float(wanted["memory_gib"]):
        raise ValueError(
            f"--memory-gib {wanted['memory_gib']}: {run.shared_gib} GiB of it are shared memory: give more"
        )
    if not run.recipe.is_relative_to(checkout.ROOT):
        raise ValueError(f"{run.recipe} is not in the image: put the recipe into the checkout ({checkout.ROOT})")
    if odd := [flag for flag in run.flags if re.search(r"""['"\\$`\n]""", flag)]:
        raise ValueError(f"{odd[0]!r}: Ray changes quotes, $ and \\ of a flag: write it into a file, for --config FILE")
    secret = f"envFrom: [{{secretRef: {{name: {wanted['secret']}}}}}]" if wanted["secret"] else ""
    gpus = f", nvidia.com/gpu: {run.gpus}" if run.gpus else ""
    fill = {**wanted, "checkout": checkout.ROOT, "secret": secret, "gpus": gpus, "shared": run.shared_gib}
    pod, volumes = (_lines(text.format(**fill)) for text in (POD, VOLUMES))
    workers = ""
    if run.nodes > 1:
        # An anchor is defined once: the head's amount is everyone's.
        own = [re.sub(r"&amount .*", "*amount", line) for line in pod]
        workers = WORKERS.format(count=run.nodes - 1, **fill) + _indented(own, 16) + "\n" + _indented(volumes, 12)
    values = facts.places(run) | {
        "FILE": file.name,
        "JOB": f"{run.name}-{time.strftime('%m%d-%H%M%S')}",
        "LABELS": f"  labels: {{kueue.x-k8s.io/queue-name: {wanted['queue']}}}" if wanted["queue"] else "",
        "ATTEMPTS": wanted["attempts"],
        "RECIPE": shlex.quote(str(run.recipe.relative_to(checkout.ROOT))),
        "FLAGS": run.command.replace("'", '"'),
        "RAY": version("ray"),
        "IMAGE": wanted["image"],
        "POD": _indented(pod, 14).lstrip(),
        "QUEUED": _indented(volumes, 10),
        "WORKERS": workers,
    }
    text = facts.render("k8s.yaml", values)
    if found := mistakes(text):
        raise ValueError("the manifest would be refused: " + "; ".join(f"line {n}: {what}" for n, what in found))
    return text


def told(run: Facts) -> list[tuple[str, str]]:
    """What was decided, for the terminal."""
    return [("shared memory", f"{run.shared_gib} GiB of each pod"), ("run's folder", "/shared/runs/JOB, on the claim")]


def secrets() -> dict[str, str]:
    """The operator makes the token."""
    return {}


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _indented(lines: list[str], by: int) -> str:
    return "\n".join(" " * by + line for line in lines)
