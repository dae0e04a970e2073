"""One file per scheduler: short, right, without secrets; what cannot fit is refused; planted mistakes have a line."""

import json
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from models import make_model
from rl import checkout
from rl.config import Config, RolloutConfig, TrainerConfig
from rl.types import Data
from trainer.commands.launch import launch_on
from trainer.launchers import facts, k8s, sky, slurm
from trainer.launchers.mistakes import mistakes
from trainer.runs.resume import newest

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart.py"
K8S = {"image": "registry.example/unison:1", "claim": "shared", "memory_gib": "64", "cpus": "8"}
K8S |= {"secret": "hub", "queue": "lab", "attempts": "3"}
SLURM = {"time": "1:00:00", "partition": "lab", "account": "", "cpus_per_node": "4", "interface": "eth0"}
SKY = {"infra": "aws", "bucket": "my-runs", "on_demand": ""}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("model"), peak=1.0))


@pytest.fixture
def run(model, tmp_path):
    def made(settings: dict[str, str], *, nodes: int = 2, gpus: int = 4, gpu: str = "H100", gpu_gib=None, **parts):
        share, tp = parts.pop("share", 0.5), parts.pop("tp", 1)
        engines = {"engines": parts.pop("engines", 4), "tensor_parallel": tp, "gpu_memory_utilization": share}
        rollout = RolloutConfig(max_tokens=8, **engines)
        trainer = TrainerConfig(ranks=parts.pop("ranks", 4))
        config = Config(
            name="My_run",
            model=model,
            data=Data(train=[]),
            reward=lambda _: 0.0,
            rollout=rollout,
            trainer=trainer,
            output_dir=str(tmp_path / "runs"),
            **parts,
        )
        flags = ["--name", "My run", "--trainer.lr", "1e-6"]
        return facts.facts(RECIPE, config, flags, nodes=nodes, gpus=gpus, gpu=gpu, gpu_gib=gpu_gib, **settings)

    return made


def manifest(run) -> str:
    return k8s.render(run(K8S), Path("my-run.yaml"))


def test_every_file_is_short_and_holds_no_secret(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("UNISON_CLUSTER_TOKEN", "cluster_secret")
    files = [slurm.render(run(SLURM), Path("a.sbatch")), manifest(run), sky.render(run(SKY), Path("a.yaml"))]
    for text in files:
        assert len(text.splitlines()) < 80
        assert "_secret" not in text
        assert not re.search(r"@[A-Z_]+@", text), "a value was not filled in"


def test_the_batch_script_is_what_a_shell_reads(run, tmp_path):
    text = slurm.render(run(SLURM), Path("a.sbatch"))
    (tmp_path / "a.sbatch").write_text(text)
    assert subprocess.run(["bash", "-n", str(tmp_path / "a.sbatch")], capture_output=True).returncode == 0
    for line in ("--nodes=2", "--gpus-per-node=H100:4", "--signal=B:TERM@60", "--requeue", "--time=1:00:00"):
        assert f"#SBATCH {line}\n" in text
    assert "account" not in text, "a setting that was not given has no line"
    assert "--name 'My run' --trainer.lr 1e-6" in text
    assert (tmp_path / "runs" / "slurm").is_dir(), "SLURM opens the output before the script runs"


def test_the_task_of_sky_is_valid_yaml_whose_script_a_shell_reads(run, tmp_path):
    task = yaml.safe_load(sky.render(run(SKY), Path("a.yaml")))
    assert task["resources"] == {"infra": "aws", "accelerators": "H100:4", "use_spot": True}
    assert task["secrets"] == {"UNISON_CLUSTER_TOKEN": None}
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"nodes": 1}, "needs 8 GPUs"),
        ({"tp": 8, "engines": 1, "ranks": 4, "nodes": 3}, "is on one node"),
        ({"nodes": 0}, "1 node or more"),
        ({"device": "cpu"}, "device=cpu, and --gpus-per-node 4"),
        ({"gpu_gib": 0.01}, "does not fit"),
        ({"gpu_gib": 80, "share": 0.999}, "the engine, next to its share of the GPU needs"),
        ({"gpu_gib": 80, "gpus": 0}, "leave --gpu-gib out"),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_is_written(run, wanted, message):
    with pytest.raises(ValueError, match=message):
        run(SLURM, **wanted)


def test_a_launcher_names_the_setting_that_it_lacks(run):
    for module, settings, lacking in ((k8s, K8S, "claim"), (k8s, K8S, "image"), (sky, SKY, "bucket")):
        with pytest.raises(ValueError, match=f"--{lacking} is needed"):
            module.render(run(settings | {lacking: ""}), Path("a.yaml"))
    with pytest.raises(ValueError, match="are shared memory: give more"):
        k8s.render(run(K8S | {"memory_gib": "8"}), Path("a.yaml"))


@pytest.mark.parametrize("release", ["v1.6.1", "v1.6.2", None])
def test_a_rendered_manifest_has_only_keys_that_kuberay_knows(run, release):
    schema = json.loads((ROOT / "tests/data/kuberay" / f"{release}.json").read_text()) if release else None
    assert mistakes(manifest(run), schema) == []
    assert mistakes(k8s.render(run(K8S, nodes=1, gpus=8), Path("a.yaml")), schema) == []
    assert mistakes(manifest(run).replace("backoffLimit", "backofLimit"), schema), "the schema refuses nothing"


HEAD, WORKER = "headGroupSpec", "workerGroupSpecs"
MISTAKES = {
    "a typo": ("backoffLimit: 3", "backofLimit: 3", "has no backofLimit: did you mean backoffLimit"),
    "a typo in the cluster": ("authOptions:", "authOption:", "has no authOption: did you mean authOptions"),
    "a typo in a pod": ("terminationGracePeriodSeconds:", "terminationGracePeriod:", "has no terminationGracePeriod"),
    "a typo in a container": ("resources:", "ressources:", "has no ressources: did you mean resources"),
    "replica": ("replicas: 1", "replica: 1", "has no replica"),
    "a number as text": ("backoffLimit: 3", 'backoffLimit: "3"', "must be of type integer"),
    "a number where text must be": (f'rayVersion: "{version("ray")}"', "rayVersion: 3", "must be of type string"),
    "a mapping where a list must be": ("            - name: ray\n", "              name: ray\n", "must be a list"),
    "no group name": ("groupName: workers", "rayStartParams: {}", "lacks groupName"),
    "no authentication": ("mode: token", "mode: disabled", "needs mode: token"),
    "another Ray": (f'rayVersion: "{version("ray")}"', 'rayVersion: "2.9.0"', "must be the image's Ray"),
    "no resume": (" --resume auto", "", "needs --resume auto"),
    "a secret in the environment": ("name: HF_HOME, value: /shared/hub", "name: HF_TOKEN, value: x", "secret in clear"),
    "a secret for Ray": (
        "  rayClusterSpec:",
        "  runtimeEnvYAML: '{HF_TOKEN: x}'\n  rayClusterSpec:",
        "prints it",
    ),
    "no volume": ("- {name: shared, persistentVolumeClaim", "- {name: other, persistentVolumeClaim", "no such volume"),
    "runs that vanish": ("persistentVolumeClaim: {claimName: shared}", "emptyDir: {}", "needs a persistentVolumeClaim"),
    "too little shared memory": ("sizeLimit: 10Gi", "sizeLimit: 64Mi", "needs 2Gi or more of medium Memory"),
    "shared memory on a disk": ("medium: Memory, ", "", "needs 2Gi or more of medium Memory"),
    "less memory than shared memory": ("memory: 64Gi", "memory: 8Gi", "must be above the 10Gi"),
    "no time to save": ("terminationGracePeriodSeconds: 60", "terminationGracePeriodSeconds: 5", "must be 60 or more"),
    "workers of another image": ("image: registry.example/unison:1\n", "image: other:2\n", "must be the head's image"),
    "a size that changes": ("maxReplicas: 1", "maxReplicas: 4", "a run has a fixed size"),
    "another kind": ("kind: RayJob", "kind: RayCluster", "must be RayJob"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_named_with_its_line(run, name):
    right, wrong, message = MISTAKES[name]
    text = manifest(run)
    assert right in text
    planted = text.replace(right, wrong, 1)
    if name in ("workers of another image", "no volume", "shared memory on a disk"):
        first, second = text[: text.index(WORKER)], text[text.index(WORKER) :]
        planted = first + second.replace(right, wrong, 1)
    found = mistakes(planted)
    assert any(message in what for _, what in found), found
    line, _ = next(each for each in found if message in each[1])
    changed = [i for i, (a, b) in enumerate(zip(text.splitlines(), planted.splitlines(), strict=False), 1) if a != b]
    # The line itself, or where its key begins.
    assert changed[0] - 6 <= line <= changed[0] + 1, (line, changed[0], found)


def test_a_second_attempt_finds_the_newest_folder_that_has_a_checkpoint(tmp_path):
    assert newest(tmp_path / "echo") is None
    for folder in ("echo", "echo-2", "echo-10", "echo-more"):
        (tmp_path / folder / "checkpoints").mkdir(parents=True)
    assert newest(tmp_path / "echo") is None
    for folder in ("echo-2", "echo", "echo-more"):
        (tmp_path / folder / "checkpoints" / "step-000002").mkdir()
    assert newest(tmp_path / "echo") == tmp_path / "echo-2"
    assert checkout.ROOT == ROOT


@pytest.mark.parametrize(
    ("module", "setting", "value"),
    [
        (slurm, "time", "24h"),
        (slurm, "time", "tomorrow"),
        (slurm, "partition", "gpu; rm -rf ~"),
        (slurm, "partition", "gpu\ntouch /tmp/evil"),
        (slurm, "account", 'my"acc'),
        (slurm, "interface", "ib0;ls"),
        (slurm, "cpus_per_node", "0"),
        (k8s, "image", "REG ISTRY/u:1"),
        (k8s, "image", "REGISTRY/u:1"),
        (k8s, "claim", "My_Claim"),
        (k8s, "secret", "HF_TOKEN=hf_abcdefghijkl"),
        (k8s, "queue", "q q"),
        (k8s, "attempts", "-1"),
        (k8s, "cpus", "0"),
        (sky, "on_demand", "true"),
        (sky, "bucket", "b b"),
    ],
)
def test_a_setting_that_a_scheduler_would_read_otherwise_is_refused_and_not_repeated(run, module, setting, value):
    right = {slurm: SLURM, k8s: K8S, sky: SKY}[module]
    run(right)
    with pytest.raises(ValueError, match=f"^--{setting.replace('_', '-')}: write ") as refused:
        run(right | {setting: value})
    assert value not in str(refused.value)


def test_a_flag_that_looks_like_a_secret_is_refused_and_a_quoted_one_where_ray_would_change_it(run):
    made = run(K8S)
    for flag in ('<a "b">', "a'b", "$HOME", "a\\b", "a\nb"):
        with pytest.raises(ValueError, match="--config FILE"):
            k8s.render(facts.replace(made, flags=["--rollout.stop", flag]), Path("f.yaml"))
    with pytest.raises(ValueError, match="looks like a secret") as refused:
        facts.facts(RECIPE, made.config, ["--name", "hf_abcdefghij"], nodes=2, gpus=4, **K8S)
    assert "hf_" not in str(refused.value)


def test_a_job_without_cpus_gets_whole_nodes_and_idle_gpus_are_counted(run):
    whole = slurm.render(run(SLURM | {"cpus_per_node": ""}), Path("f"))
    assert "#SBATCH --exclusive\n#SBATCH --mem=0\n" in whole
    part = slurm.render(run(SLURM), Path("f"))
    assert "--exclusive" not in part.partition("cd ")[0]
    assert "#SBATCH --cpus-per-task=4" in part
    assert run(SLURM).idle == 0
    assert run(SLURM, nodes=3, gpus=8).idle == 16


def test_a_file_that_exists_is_replaced_only_by_force(model, tmp_path, capsys):
    file = tmp_path / "mine.sbatch"
    words = ["slurm", str(RECIPE), "--gpus-per-node", "0", "--out", str(file)]
    flags = ["--", "--device", "cpu", "--model", model, "--output-dir", str(tmp_path / "runs")]
    assert launch_on([*words, *flags]) == 0
    file.write_text("mine")
    with pytest.raises(ValueError, match="may hold changes of yours"):
        launch_on([*words, *flags])
    assert file.read_text() == "mine"
    assert launch_on([*words, "--force", *flags]) == 0
    with pytest.raises(ValueError, match=r"--trainer\.ranks is no option.* come after --"):
        launch_on([*words, "--trainer.ranks", "8", *flags])
    sky_words = ["sky", str(RECIPE), "--gpus-per-node", "0", "--bucket", "b", "--out", str(tmp_path / "sky.yaml")]
    assert launch_on([*sky_words, *flags]) == 0
    assert "Send it with: UNISON_CLUSTER_TOKEN=$(openssl rand -hex 32) sky jobs launch" in capsys.readouterr().out
