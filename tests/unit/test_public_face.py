"""The public face of `rl`: every name that recipes may import from it is there, is documented, and costs nothing before
it is used."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rl


@pytest.mark.parametrize("name", rl.__all__)
def test_every_public_name_can_be_imported_and_is_documented(name):
    public = getattr(rl, name)
    assert public is getattr(importlib.import_module(public.__module__), name), "the same object as in its own module"
    assert public.__doc__
    assert not public.__doc__.startswith(f"{name}("), "a docstring of its own, not the signature that dataclass writes"


def test_each_name_is_listed_once_and_completion_finds_it():
    assert len(set(rl.__all__)) == len(rl.__all__)
    assert set(rl.__all__) <= set(dir(rl))


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'rl' has no attribute 'GPSO'"):
        _ = rl.GPSO
    with pytest.raises(ImportError, match="cannot import name 'GPSO'"):
        from rl import GPSO  # noqa: F401


@pytest.mark.slow
def test_the_package_alone_loads_no_torch_and_a_run_boots_its_actors_without_transformers():
    loads = (
        "import sys, rl; assert 'torch' not in sys.modules; from rl import GSPO; assert 'torch' in sys.modules; "
        "import trainer.run; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", loads], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("loaded", ["nothing", "torch", "LD_PRELOAD"])
def test_an_actor_computes_with_the_threads_of_its_environment(loaded: str):
    first = {"torch": "import torch"}.get(loaded, "import sys; assert 'torch' not in sys.modules")
    code = (
        f"from rl.checkout import digest; from trainer.cluster.actors import ActorShell; {first}; "
        "ActorShell({'OMP_NUM_THREADS': '1'}).build('torch:Generator', digest(), {}); "
        "import torch; assert torch.get_num_threads() == 1, torch.get_num_threads()"
    )
    # Tests before this one may have set MKL_NUM_THREADS, which counts more, or LD_PRELOAD, as vLLM does.
    env = {name: value for name, value in os.environ.items() if not name.endswith(("_NUM_THREADS", "LD_PRELOAD"))}
    if loaded == "LD_PRELOAD":
        [openmp] = (Path(torch.__file__).parent / "lib").glob("libgomp*")
        env["LD_PRELOAD"] = str(openmp)
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
