"""What is wrong with a RayJob? Keys that KubeRay does not know, and what a run needs besides, each with its line."""

import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from trainer.cluster.process_env import SECRET
from trainer.launchers.facts import LEAST_GRACE

LEAST_SHARED = 2.0
"""GiB below which NCCL, vLLM and Ray lack shared memory."""


def mistakes(text: str, schema: dict[str, Any] | None = None) -> list[tuple[int, str]]:
    """Line and text of each mistake of a manifest, in the order of lines."""
    schema = schema or json.loads((Path(__file__).parent / "rayjob.json").read_text())
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        return [(line, f"is no YAML: {error.problem}")]
    if not isinstance(tree, yaml.MappingNode):
        return [(1, "is no mapping: write apiVersion, kind, metadata and spec")]
    found = list(_unknown(tree, schema["root"], schema["defs"], ""))
    if not found:
        found = list(_unfit(tree, yaml.safe_load(text)))
    return sorted(found)


def _unknown(node: Any, schema: Any, defs: dict[str, Any], path: str) -> Iterator[tuple[int, str]]:
    """Keys that the resource has not, that it needs, and values of another type."""
    line = node.start_mark.line + 1
    schema = defs[schema] if isinstance(schema, str) and schema.startswith("#") else schema
    if isinstance(schema, dict):
        if not isinstance(node, yaml.MappingNode):
            yield line, f"{path} must be a mapping"
            return
        keys = [key.value for key, _ in node.value]
        yield from ((line, f"{path or 'the manifest'} lacks {key}") for key in schema.get("!", ()) if key not in keys)
        for key, value in node.value:
            inner = schema.get(key.value, schema.get("*")) if key.value != "!" else None
            if inner is None:
                near = get_close_matches(key.value, schema, 1)
                meant = f": did you mean {near[0]}?" if near else ""
                yield key.start_mark.line + 1, f"{path or 'the manifest'} has no {key.value}{meant}"
            else:
                yield from _unknown(value, inner, defs, f"{path}.{key.value}".lstrip("."))
    elif isinstance(schema, list):
        if not isinstance(node, yaml.SequenceNode):
            yield line, f"{path} must be a list"
            return
        for i, each in enumerate(node.value):
            yield from _unknown(each, schema[0], defs, f"{path}[{i}]")
    else:
        kind = node.tag.rpartition(":")[2]
        right = {"string": ("str",), "integer": ("int",), "boolean": ("bool",), "string or integer": ("str", "int")}
        if kind not in right.get(schema, (kind,)):
            yield line, f"{path} must be of type {schema}"


def _unfit(tree: Any, job: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """What the resource allows, and a run does not."""
    spec, cluster = ("spec",), ("spec", "rayClusterSpec")

    def wrong(path: tuple[Any, ...], text: str) -> tuple[int, str]:
        return _line(tree, path), f"{'.'.join(map(str, path))}: {text}"

    if job["kind"] != "RayJob":
        yield wrong(("kind",), "must be RayJob")
        return
    ray = job["spec"]["rayClusterSpec"]
    if ray.get("rayVersion") != version("ray"):
        yield wrong((*cluster, "rayVersion"), f'must be the image\'s Ray, "{version("ray")}"')
    if ray.get("authOptions", {}).get("mode") != "token":
        yield wrong((*cluster, "authOptions"), "needs mode: token: without, whoever reaches the head runs code")
    if job["spec"].get("backoffLimit") and "--resume auto" not in job["spec"].get("entrypoint", ""):
        yield wrong((*spec, "entrypoint"), "needs --resume auto: another attempt would begin again")
    if re.search("|".join(SECRET), job["spec"].get("runtimeEnvYAML", "").upper()):
        yield wrong((*spec, "runtimeEnvYAML"), "holds a secret, and Ray prints it: use envFrom with a secretRef")
    workers = len(ray.get("workerGroupSpecs", []))
    groups = [(*cluster, "headGroupSpec"), *((*cluster, "workerGroupSpecs", i) for i in range(workers))]
    image = _at(job, (*groups[0], "template", "spec", "containers", 0, "image"))
    for group in groups:
        pod = (*group, "template", "spec")
        one = (*pod, "containers", 0)
        found, container = _at(job, pod), _at(job, one)
        volumes = {each["name"]: each for each in found.get("volumes", [])}
        mounts = {each["mountPath"]: each["name"] for each in container.get("volumeMounts", [])}
        for path, name in mounts.items():
            if name not in volumes:
                yield wrong((*one, "volumeMounts"), f"{path} mounts {name}, and the pod has no such volume")
        memory = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})
        size = _gib(memory.get("sizeLimit", "0"))
        limits = container.get("resources", {}).get("limits", {})
        if memory.get("medium") != "Memory" or size < LEAST_SHARED:
            yield wrong((*pod, "volumes"), f"needs {LEAST_SHARED:g}Gi or more of medium Memory at /dev/shm")
        elif size >= _gib(limits.get("memory", "0")):
            yield wrong((*one, "resources"), f"limits.memory must be above the {size:g}Gi of shared memory in it")
        if "persistentVolumeClaim" not in volumes.get(mounts.get("/shared", ""), {}):
            where = (*pod, "volumes") if "/shared" in mounts else (*one, "volumeMounts")
            yield wrong(where, "needs a persistentVolumeClaim at /shared, for checkpoints")
        if container.get("image") != image:
            yield wrong((*one, "image"), "must be the head's image: other sources are refused")
        requests = container.get("resources", {}).get("requests", {})
        if requests.get("nvidia.com/gpu") != limits.get("nvidia.com/gpu"):
            yield wrong((*one, "resources"), "requests and limits must name the same number of GPUs")
        for i, each in enumerate(container.get("env", [])):
            if "value" in each and any(part in each["name"].upper() for part in SECRET):
                yield wrong((*one, "env", i), f"{each['name']} is a secret in clear: use envFrom with a secretRef")
        if group is groups[0]:
            if found.get("terminationGracePeriodSeconds", 30) < 2 * LEAST_GRACE:
                yield wrong((*pod, "terminationGracePeriodSeconds"), "must be 60 or more, for a checkpoint")
        else:
            one_size = {_at(job, group).get(key) for key in ("replicas", "minReplicas", "maxReplicas")}
            if len(one_size) > 1:
                yield wrong((*group, "replicas"), "minReplicas and maxReplicas must equal it: a run has a fixed size")


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _line(node: Any, path: tuple[Any, ...]) -> int:
    """Line of a place, or of the nearest one around it that exists."""
    line = node.start_mark.line + 1
    for key in path:
        if isinstance(node, yaml.SequenceNode):
            node = node.value[key]
            line = node.start_mark.line + 1
            continue
        pair = next(((name, value) for name, value in node.value if name.value == key), None)
        if pair is None:
            return line
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line


def _gib(amount: Any) -> float:
    found = re.fullmatch(r"([\d.]+)(Ki|Mi|Gi|Ti)?", str(amount))
    if not found:
        return 0.0
    return float(found[1]) * {"Ki": 2**-20, "Mi": 2**-10, "Gi": 1.0, "Ti": 2.0**10, None: 2.0**-30}[found[2]]
