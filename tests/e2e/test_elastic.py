"""Real engines follow the nodes of a real cluster: three, then two, then four, in one run."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runs import every_prompt_was_trained_once, start, wait_for
from trainer.node import ports
from trainer.node.node import Node
from trainer.node.processes import processes

pytestmark = [pytest.mark.nightly, pytest.mark.serial]


def cluster(*words: str, token: str = "") -> None:
    """`unison cluster`, with every node on this machine's own loopback."""
    command = [sys.executable, "-c", "from trainer.cli import main; main()", "cluster", *words]
    done = subprocess.run(command, input=token, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def nodes(head: Node | None = None) -> dict[int, Node]:
    """Those on this machine, of one cluster where it is given, by their first port."""
    found = {Node(folder).base: Node(folder) for folder in ports.mine()}
    return {base: node for base, node in found.items() if head is None or node.head == head.head}


@pytest.fixture
def head() -> Iterator[Node]:
    """A head with room for the learner and one engine, and two nodes with room for an engine each."""
    before = nodes()
    cluster("head", "--interface", "lo", "--cpus", "2", "--gpus", "0")
    (first,) = (node for base, node in nodes().items() if base not in before)
    try:
        for _ in range(2):
            join(first)
        yield first
    finally:
        for node in nodes().values():
            if node.base not in before:
                node.end()


def join(head: Node) -> int:
    """A further node; returns its first port."""
    before = nodes()
    words = ["--token-file", "-", "--interface", "lo", "--cpus", "1", "--gpus", "0"]
    cluster("join", head.head, *words, token=head.token.read_text())
    (base,) = nodes().keys() - before.keys()
    return base


def has_learner(node: Node) -> bool:
    return any("ray::LearnerActor" in " ".join(process.cmdline()) for process in processes(node.folder))


@pytest.mark.timeout(1800)
def test_three_engines_become_two_and_then_four_in_one_run(head: Node, echo_model: Path, tmp_path: Path) -> None:
    flags = "--rollout.engines 3 --rollout.max-engines 4 --max-staleness 2 --steps 5000 --doctor off"
    # More groups than engines, or ties would leave the newest ones idle.
    flags += " --prompts-per-step 8 --group-size 4 --tracking.wandb off --tracking.samples-per-step 32 --device cpu"
    flags += " --no-save-final --save-every 100000 --eval-every 0"
    run, rows = tmp_path / "echo", tmp_path / "echo" / "metrics.jsonl"
    process, _ = start(echo_model, tmp_path, *flags.split(), env={"RAY_ADDRESS": head.head})

    def steps() -> list[dict[str, float]]:
        lines = rows.read_text().splitlines() if rows.exists() else []
        # The last line may be half written.
        return [row for line in lines if line.endswith("}") and "reward/mean" in (row := json.loads(line))]

    def engines(count: int) -> None:
        wait_for(process, tmp_path, f"step with {count} engines", lambda: steps()[-1:] != [] and now() == count)

    def now() -> float:
        return steps()[-1]["perf/engines"]

    engines(3)
    leaving = next(node for node in nodes(head).values() if node.base != head.base and not has_learner(node))
    cluster("stop", "--drain", "120", "--port-base", str(leaving.base))
    engines(2)
    for _ in range(2):
        join(head)
    engines(4)
    last = steps()[-1]["step"]
    wait_for(process, tmp_path, "steps of all four", lambda: steps()[-1]["step"] >= last + 5)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(300) == 143
    found = steps()
    assert max(row["staleness/max"] for row in found) <= 2
    every_prompt_was_trained_once(run, prompts=8 * len(found), samples=4)
    causes = json.loads((run / "summary.json").read_text())["engines_lost"]
    # A further engine may be given the free place on the node that leaves, and begins again elsewhere.
    lost = [cause for cause in causes if " did not start: " not in cause]
    assert [cause.partition(": ")[2] for cause in lost] == ["its node is drained"]
    # The newest engine has served: it has a speed of its own.
    assert any("perf/engine_3/tokens_per_s" in row for row in found)
