"""The layout holds: small folders, small files, no circle of imports, nothing imports upward, no call by a string."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")
PACKAGES = ("rl", "rollout", "trainer")
MOST_FILES, MOST_LINES, MOST_CODE_LINES = 14, 300, 24_900
BY_STRING = re.compile(
    r"""(\.call\.remote|\bask_\w+|\.ask|collective_rpc)\((\w+(\.\w+)*, *)?f?["']|getattr\([^()]*["'][^()]*\)\("""
)
"""A call to another process that names its method in a string."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path, root: Path = ROOT) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports_of(source: str, modules: set[str]) -> set[str]:
    """Modules of ours that a source imports, at once or later; what only annotations need is never imported."""
    found: set[str] = set()
    tree = ast.parse(source)
    for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    left_out = {inner for node in for_types for inner in ast.walk(node)}
    for node in set(ast.walk(tree)) - left_out:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found & modules


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Each circle that a walk along imports runs into."""
    found, done = [], set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            found.append(path[path.index(module) :])
        elif module not in done:
            for target in sorted(graph[module]):
                walk(target, [*path, module])
            done.add(module)

    for module in sorted(graph):
        walk(module, [])
    return found


def without_blanks_and_docs(source: str) -> int:
    """Lines of code: no blank line, comment or docstring."""
    docs = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and i not in docs for i, line in lines)


def test_no_folder_has_more_than_fourteen_files():
    folders = {path.parent for path in sources(*PACKAGES, "recipes", "scripts")}
    counts = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    counts = {name: n - (ROOT / name / "__init__.py").exists() for name, n in counts.items()}
    assert {name: n for name, n in counts.items() if n > MOST_FILES} == {}


def test_no_file_has_more_than_three_hundred_lines():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(*PACKAGES, "recipes")}
    assert {name: n for name, n in lines.items() if n > MOST_LINES} == {}


def test_the_product_stays_below_its_size_in_lines_of_code():
    assert (
        without_blanks_and_docs('"""Doc."""\n\n# why\nx = 1\n\n\ndef f():\n    """Doc\n    more."""\n    return x\n')
        == 3
    )
    assert sum(without_blanks_and_docs(path.read_text()) for path in sources(*PACKAGES)) < MOST_CODE_LINES


WATCHING = (
    *("trainer/record/*.py", "trainer/view/*.*", "trainer/commands/view.py", "trainer/commands/watch.py"),
    *("trainer/runs/reading.py", "trainer/runs/code_state.py", "trainer/tracking/[!m]*.py"),
    *("trainer/tracking/mlflow_run.py", "rl/episodes/seen.py", "rl/settings/tracking.py"),
)
"""The record, the page, `unison watch` and the trackers. EARLIER of their lines are older than these."""
EARLIER, WIDEST = 324, 120


def test_the_page_is_no_denser_than_the_rest_of_the_code():
    files = [path for pattern in WATCHING for path in sorted(ROOT.glob(pattern))]
    page = [path for path in files if path.suffix != ".py"]
    lines = [line for path in page for line in path.read_text().splitlines()]
    assert len(page) == 3
    assert [line for line in lines if len(line) > WIDEST] == []
    code = sum(bool(line.strip()) and not line.strip().startswith("//") for line in lines)
    code += sum(without_blanks_and_docs(path.read_text()) for path in files if path.suffix == ".py")
    print(f"record, page, watch and trackers: {code - EARLIER} lines of code")
    assert code - EARLIER <= 2200


def test_launch_and_cluster_stay_small():
    files = ("trainer/launchers/*.py", "trainer/commands/launch.py", "trainer/commands/cluster.py", "trainer/node/*.py")
    counts = [without_blanks_and_docs(path.read_text()) for name in files for path in ROOT.glob(name)]
    templates = [path for path in ROOT.glob("trainer/launchers/*") if path.suffix in (".sbatch", ".yaml")]
    assert len(counts) == 15
    assert len(templates) == 3
    assert sum(counts) <= 900
    assert max(len(path.read_text().splitlines()) for path in templates) <= 80


def test_no_module_imports_itself_by_way_of_others():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    modules = {module_of(path): path for path in sources(*PACKAGES)}
    graph = {name: imports_of(path.read_text(), set(modules)) - {name} for name, path in modules.items()}
    assert "rl.types" in graph["rl.batch"], "imports were not found"
    assert circles(graph) == []


def test_nothing_imports_upward():
    """The layers are contracts in pyproject.toml."""
    done = subprocess.run([LINT_IMPORTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("nothing imports upward KEPT") == 3


@pytest.mark.parametrize(
    ("line", "by_string"),
    [
        ('await cluster.ask_engines("sample", prompt)', True),
        ('engine.call.remote("sample", 3)', True),
        ('getattr(self.engine, "sample")(3)', True),
        ("await cluster.ask_engines(lambda e: e.sample(prompt))", False),
        ("engine.ask(lambda e: e.close())", False),
        ('self.llm.collective_rpc("begin_trace")', True),
        ("collective_rpc(ask.__name__, args=args)", False),
        ('x = getattr(module, "weight", None)', False),
    ],
)
def test_what_counts_as_a_call_by_a_string(line, by_string):
    assert bool(BY_STRING.search(line)) == by_string


def test_no_call_between_processes_names_its_method_in_a_string():
    lines = [(path, line) for path in sources(*PACKAGES) for line in path.read_text().splitlines()]
    assert [f"{path.relative_to(ROOT)}: {line.strip()}" for path, line in lines if BY_STRING.search(line)] == []
