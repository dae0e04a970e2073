"""No split over ranks or ZeRO stages changes what is learned: same losses, same metrics, same weights."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import pytest
import torch
from safetensors.torch import load_file

from cases import nightly_unless
from models import make_model
from trainer.cluster.process_env import learner_env

WORKER = Path(__file__).parent / "rank_worker.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("ranks"), tied=True, peak=1.0)


Tensors = dict[str, torch.Tensor]
History = list[dict]


class LearnerError(Exception):
    """Every rank answered, and at least one with an error: the group can be used again."""


class Group:
    """Processes that stay in one process group, and build a learner for every request: most of a start is imports."""

    def __init__(self, ranks: int, log: IO[str]) -> None:
        self.log = log
        # Rank 0 goes on with this socket; a port that is closed meanwhile can be another process's by then.
        listener = socket.create_server(("127.0.0.1", 0))
        port, descriptor = listener.getsockname()[1], listener.fileno()
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", str(WORKER), *map(str, (rank, ranks, port, descriptor))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | learner_env(1, "cpu"),
                pass_fds=() if rank else [descriptor],
            )
            for rank in range(ranks)
        ]
        listener.close()

    def ask(self, request: dict) -> History:
        """Rank 0's metrics by step; raises with the error of every rank that has one."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        answers = [self._answer(rank) for rank in range(len(self.processes))]
        errors = [answer["error"] for answer in answers if "error" in answer]
        if errors:
            raise LearnerError("\n".join(errors))
        return answers[0]["history"]

    def _answer(self, rank: int) -> dict:
        out = self.processes[rank].stdout
        assert out is not None
        for line in out:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise AssertionError(f"rank {rank} ended: {Path(self.log.name).read_text()[-3000:]}")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@dataclass
class Groups:
    """Groups of one and of two ranks, and all that they have trained."""

    model: Path
    log: IO[str]
    groups: dict[int, Group] = field(default_factory=dict)
    done: dict[tuple, tuple[History, Tensors]] = field(default_factory=dict)

    def trained(
        self,
        objective: str,
        ranks: int,
        stage: int,
        dtype: str = "float32",
        resume: Path | None = None,
        more: Literal["", "lora", "offload", "sequence", "small"] = "",
    ) -> tuple[History, Tensors]:
        """Metrics by step, and the weights of before and after the last one. The state before it goes to `state_of`,
        unless the run begins with the one in `resume`."""
        key = (objective, ranks, stage, dtype, resume, more)
        if key not in self.done:
            self.done[key] = self._train(*key)
        return self.done[key]

    def _train(
        self, objective: str, ranks: int, stage: int, dtype: str, resume: Path | None, more: str
    ) -> tuple[History, Tensors]:
        folder = resume or state_of(self.model, objective, ranks, stage, dtype, more)
        out = self.model / f"{objective}-{ranks}-{stage}-{dtype}-{more}{f'-from-{resume.stem}' if resume else ''}.pt"
        request = {"model": str(self.model), "objective": objective, "stage": stage, "dtype": dtype, "more": more}
        request |= {"out": str(out), "folder": str(folder), "resume": resume is not None}
        if ranks not in self.groups:
            self.groups[ranks] = Group(ranks, self.log)
        try:
            return self.groups[ranks].ask(request), torch.load(out, weights_only=True)
        except LearnerError:
            raise
        except BaseException:  # a rank may still wait for one that ended
            self.groups.pop(ranks).close()
            raise


@pytest.fixture(scope="module")
def groups(model: Path) -> Iterator[Groups]:
    with (model / "ranks.log").open("w") as log:
        made = Groups(model, log)
        yield made
        for group in made.groups.values():
            group.close()


def state_of(model: Path, objective: str, ranks: int, stage: int, dtype: str = "float32", more: str = "") -> Path:
    return model / f"{objective}-{ranks}-{stage}-{dtype}-{more}.state"


def tensors(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in sorted(folder.glob("layer-*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize(
    ("objective", "ranks", "stage"),
    nightly_unless(
        lambda objective, ranks, stage: (objective, stage) != ("grpo", 2),
        [("grpo", 2, 0), ("grpo", 2, 2), ("grpo", 2, 3), ("ppo", 2, 1)],
    ),
)
def test_two_ranks_learn_what_one_learns(groups: Groups, model: Path, objective: str, ranks: int, stage: int) -> None:
    one, weights_one = groups.trained(objective, 1, 1)
    two, weights_two = groups.trained(objective, ranks, stage)
    assert len(one) == 10
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
        assert abs(a["actor/loss"] - b["actor/loss"]) <= 1e-5
    # It did learn something, and the weights that leave are the same ones.
    assert abs(one[0]["actor/loss"] - one[9]["actor/loss"]) > 1e-4
    assert weights_one.keys() == weights_two.keys()
    for name, tensor in weights_one.items():
        # Adam turns a gradient's sign into a whole step, so single weights near zero gradient may differ more.
        assert (tensor - weights_two[name]).abs().mean() <= 1e-5, name


@pytest.mark.parametrize(
    ("objective", "ranks", "stage", "dtype"),
    nightly_unless(
        lambda objective, ranks, stage, dtype: (stage, dtype) in ((1, "float32"), (3, "float32"), (1, "bfloat16")),
        [
            ("grpo", 2, 0, "float32"),
            ("ppo", 2, 1, "float32"),
            ("grpo", 2, 2, "float32"),
            ("grpo", 2, 3, "float32"),
            ("grpo", 2, 1, "bfloat16"),
            ("grpo", 2, 2, "bfloat16"),
        ],
    ),
)
def test_ranks_that_go_on_from_a_state_learn_bit_for_bit_as_if_they_had_never_stopped(
    groups: Groups, model: Path, objective: str, ranks: int, stage: int, dtype: str
) -> None:
    whole, weights = groups.trained(objective, ranks, stage, dtype)
    state = state_of(model, objective, ranks, stage, dtype)
    resumed, found = groups.trained(objective, ranks, stage, dtype, state)
    assert resumed == whole[9:]
    assert weights.keys() == found.keys()
    assert [name for name in weights if not torch.equal(weights[name], found[name])] == []
    # Something was learned after the state, and the state is more than the weights.
    name = next(name for name in weights if name.endswith("embed_tokens.weight") and not name.startswith("before/"))
    assert not torch.equal(weights[name], weights[f"before/{name}"])
    held = tensors(state)
    assert all(held[key].any() for key in held if key.startswith("exp_avg/"))
    assert all(tensor.dtype == torch.float32 for tensor in held.values())


@pytest.mark.parametrize(
    ("stage", "dtype"),
    nightly_unless(
        lambda stage, dtype: (stage, dtype) in ((0, "float32"), (3, "float32"), (1, "bfloat16")),
        [
            *((stage, "float32") for stage in (0, 1, 2, 3)),
            *((stage, "bfloat16") for stage in (1, 2, 3)),
        ],
    ),
)
def test_what_engines_get_is_the_gathered_master_rounded_bit_for_bit(
    groups: Groups, model: Path, stage: int, dtype: str
) -> None:
    _, weights = groups.trained("grpo", 2, stage, dtype)
    held = tensors(state_of(model, "grpo", 2, stage, dtype))
    masters = {key.removeprefix("weights/hf."): t for key, t in held.items() if key.startswith("weights/")}
    sent = {key.removeprefix("before/"): t for key, t in weights.items() if key.startswith("before/")}
    assert masters.keys() == sent.keys()
    for name, tensor in sent.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, masters[name].to(tensor.dtype)), name
    assert any(not torch.equal(t, t.bfloat16().float()) for t in masters.values())


@pytest.mark.parametrize("stage", nightly_unless(lambda stage: stage == 1, [(1,), (2,), (3,)]))
def test_several_micro_batches_in_bf16_have_the_gradients_of_fp32(groups: Groups, stage: int) -> None:
    exact, _ = groups.trained("grpo", 1, 1)
    history, _ = groups.trained("grpo", 2, stage, "bfloat16", more="small")
    for metric, within in (("actor/grad_norm", 0.02), ("actor/loss", 0.05)):
        assert history[0][metric] == pytest.approx(exact[0][metric], rel=within, abs=1e-3), metric


def test_two_ranks_train_the_adapters_that_one_trains_and_leave_the_base_as_it_was(groups: Groups, model: Path) -> None:
    one, weights_one = groups.trained("grpo", 1, 1, more="lora")
    two, weights_two = groups.trained("grpo", 2, 3, more="lora")
    for a, b in zip(one, two, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
    # The policy left the reference, which is itself without its adapters.
    assert one[0]["actor/kl_loss"] < 1e-4 < one[9]["actor/kl_loss"]
    base = load_file(model / "model.safetensors")
    for name, start in base.items():
        assert (weights_one[name] - weights_two[name]).abs().mean() <= 1e-6, name
        update = weights_two[name] - start
        if name.endswith("proj.weight"):
            assert update.abs().max() > 1e-4, name
            assert torch.linalg.svdvals(update)[4] < 1e-5, name  # adapters of rank 4
        else:
            assert not update.any(), name
    held = tensors(state_of(model, "grpo", 2, 3, more="lora"))
    assert all(".lora_A." in name or ".lora_B." in name for name in held)


def test_adapters_go_on_from_a_state_bit_for_bit_and_refuse_another_base(
    groups: Groups, model: Path, tmp_path: Path
) -> None:
    whole, weights = groups.trained("grpo", 2, 3, more="lora")
    state = state_of(model, "grpo", 2, 3, more="lora")
    resumed, found = groups.trained("grpo", 2, 3, resume=state, more="lora")
    assert resumed == whole[9:]
    assert [name for name in weights if not torch.equal(weights[name], found[name])] == []
    other = shutil.copytree(state, tmp_path / "other.state")
    counters = json.loads((other / "counters.json").read_text())
    (other / "counters.json").write_text(json.dumps(counters | {"base": "another"}))
    with pytest.raises(LearnerError, match="were trained on other weights: resume with the model of that run"):
        groups.trained("grpo", 1, 1, resume=other, more="lora")


@pytest.mark.parametrize(
    ("objective", "stage"),
    nightly_unless(lambda objective, stage: (objective, stage) != ("grpo", 1), [("grpo", 1), ("grpo", 3), ("ppo", 2)]),
)
def test_two_ranks_that_share_every_row_learn_what_one_learns(
    groups: Groups, model: Path, objective: str, stage: int
) -> None:
    one, weights_one = groups.trained(objective, 1, 1)
    two, weights_two = groups.trained(objective, 2, stage, more="sequence")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
    for name, tensor in weights_one.items():
        assert (tensor - weights_two[name]).abs().mean() <= 1e-5, name


def test_an_optimizer_in_the_hosts_memory_steps_as_one_beside_the_weights(groups: Groups, model: Path) -> None:
    here, weights = groups.trained("grpo", 2, 2)
    there, offloaded = groups.trained("grpo", 2, 2, more="offload")
    for a, b in zip(here, there, strict=True):
        assert b["actor/loss"] == pytest.approx(a["actor/loss"], abs=1e-6)
    for name in weights.keys() - {"random"}:
        assert (weights[name] - offloaded[name]).abs().mean() <= 1e-6, name


@pytest.mark.parametrize(
    ("objective", "before", "after"),
    # PPO's value head has a bias of one number, which two ranks cannot share.
    nightly_unless(
        lambda objective, before, after: (before, after) in (((2, 3), (1, 0)), ((1, 1), (2, 3))),
        [
            ("grpo", (2, 3), (1, 0)),
            ("grpo", (2, 0), (1, 3)),
            ("grpo", (2, 3), (1, 1)),
            ("ppo", (1, 1), (2, 3)),
            ("ppo", (2, 1), (2, 2)),
        ],
    ),
)
def test_another_number_of_ranks_or_another_zero_stage_goes_on_with_the_same_state(
    groups: Groups, model: Path, objective: str, before: tuple[int, int], after: tuple[int, int]
) -> None:
    whole, weights = groups.trained(objective, *before)
    state = state_of(model, objective, *before)
    resumed, found = groups.trained(objective, *after, resume=state)
    # What it took over is what was written, bit for bit, and it says so itself.
    again = model / f"{objective}-{after[0]}-{after[1]}-float32--from-{state.stem}.again"
    held, back = tensors(state), tensors(again)
    assert held.keys() == back.keys()
    assert [key for key in held if not torch.equal(held[key], back[key])] == []
    counters = json.loads((state / "counters.json").read_text())
    assert counters == json.loads((again / "counters.json").read_text())
    assert counters["optimizer_steps"] == 18
    # GRPO's began at 0.01 and were adapted in each of the nine steps.
    moved = {"kl_coef": 0.01 * 1.02**9, "entropy_coef": 0.01 + 9 * 0.005} if objective == "grpo" else {}
    assert counters["coefficients"] == pytest.approx(moved)
    assert resumed[0]["actor/lr"] == whole[9]["actor/lr"]
    for name in whole[9]:
        assert resumed[0][name] == pytest.approx(whole[9][name], rel=1e-5, abs=1e-6), name
    for name in weights.keys() - {"random"}:
        assert (weights[name] - found[name]).abs().max() <= (0 if name.startswith("before/") else 1e-6), name
