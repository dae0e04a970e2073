import ast
import fnmatch
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
from rl.objectives.adaptive import coefficients
from rl.objectives.grpo import GRPO
from rl.parity.mismatch import finish, mismatch
from rl.reduce import Meter

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = sorted(DOCS.rglob("*.md")) + TOP
GENERATED = {DOCS / "reference" / "configuration.md", DOCS / "reference" / "command-line.md"}
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

FAMILIES = (
    "actor critic episode eval filter judge ledger memory perf queue response_length reward rollout_corr staleness"
)
METRIC = re.compile(rf"^(?:{'|'.join(FAMILIES.split())}|timing_s|weight_sync)/[\w@*/]+$")


# -- README's recipe ---------------------------------------------------------------------------------------------------


def test_the_recipe_in_readme_runs(monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["sums.py", "--dry-run", "--device", "cpu"])
    monkeypatch.setenv("UNISON_IGNORE_MEMORY", "1")  # what else runs on this machine is not the recipe's fault
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    shown = capsys.readouterr().out
    assert '"name": "sums"' in shown
    assert "134,515,008" in shown  # parameters of the quickstart's model: its config was found and read


# -- metrics -----------------------------------------------------------------------------------------------------------


def names_in(source):
    """Names of metrics among the string constants of a Python source; what an f-string fills in is a `*`."""
    nodes = list(ast.walk(ast.parse(source)))
    filled = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in filled for part in node.values}
    texts = ["".join(p.value if isinstance(p, ast.Constant) else "*" for p in node.values) for node in filled]
    texts += [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in parts]
    return {text for text in texts if isinstance(text, str) and METRIC.match(text)}


def documented(page):
    """Names in the first column of a page's tables; `<part>` is a `*`."""
    return {re.sub(r"<\w+>", "*", name) for name in re.findall(r"^\| `([^`]+)` \|", page, re.M)}


def undocumented(sources, page):
    """Names that some source has and the page has not. A name that only moments share with `finish` is not shown."""
    have = documented(page)
    internal = {"perf/trained_tokens_count", *(f"rollout_corr/{n}" for n in ("weight_sq", "seq_is", "seq_is_sq"))}
    internal |= {"critic/returns_sq", "critic/residual", "critic/residual_sq"}
    names = set().union(*map(names_in, sources)) - internal
    return {name for name in names if not any(fnmatch.fnmatch(each, name) for each in have)}


def sources():
    return [path.read_text() for folder in ("rl", "rollout", "trainer") for path in (ROOT / folder).rglob("*.py")]


def test_every_metric_that_the_code_logs_is_documented():
    assert len(set().union(*map(names_in, sources()))) > 60, "the names are no longer found in the code"
    assert undocumented(sources(), (DOCS / "metrics.md").read_text()) == set()


@pytest.mark.parametrize("planted", ['{"perf/planted": 1.0}', 'metrics[f"planted/{x}"] = metrics[f"actor/new_{x}"]'])
def test_a_new_metric_without_a_row_is_found(planted):
    page = (DOCS / "metrics.md").read_text()
    assert undocumented([*sources(), planted], page) == {"perf/planted" if "perf" in planted else "actor/new_*"}


def test_every_mismatch_metric_is_documented():
    """`rl.parity.mismatch` builds its names, so they are taken from a step of two sequences."""
    made = inspect.get_annotations(mismatch)["batch"]
    numbers = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]])
    batch = made(
        input_ids=torch.zeros(2, 3, dtype=torch.long),
        mask=torch.ones(2, 2, dtype=torch.bool),
        rollout_logprobs=numbers,
        versions=torch.zeros(2, 2, dtype=torch.long),
        rewards=torch.zeros(2),
        group_ids=torch.zeros(2, dtype=torch.long),
        old_logprobs=numbers + 0.1,
        ref_logprobs=numbers,
        values=numbers,
    )
    meter = Meter()
    meter.add(mismatch(batch), batch.mask)
    shown = set(finish(meter.means()))
    assert "rollout_corr/ess" in shown
    assert shown <= documented((DOCS / "metrics.md").read_text())


def test_every_coefficient_that_moves_is_documented():
    moving = coefficients(GRPO(kl_coef=0.01, kl_target=0.02, entropy_target=0.2))
    assert {f"actor/{name}" for name in moving} <= documented((DOCS / "metrics.md").read_text())


# -- generated pages ---------------------------------------------------------------------------------------------------


def script(name, monkeypatch):
    folder = ROOT / "scripts" / "docs"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location(f"docs_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_page_is_up_to_date(monkeypatch):
    module = script("config_reference", monkeypatch)
    assert module.PAGE.read_text() == module.page(module.source()), "run scripts/docs/config_reference.py"


def test_the_table_of_what_episodes_learn_is_that_of_the_stored_figures(monkeypatch):
    module = script("episodes", monkeypatch)
    assert module.main(["--check"]) == 0
    run = {"seed": 1, "train_seconds": 100.4, "tokens": 12345, "worst_gap_of_a_turn": 1.3e-6}
    for when, value in (("eval_before", 0.5), ("eval_after", 0.9375)):
        run[when] = {"eval/held_out/avg@1": value, "eval/held_out/avg@1_se": 0.031, "eval/held_out/pass@1": value}
    row = "| `guess_the_number` | 1 | 0.500 ± 0.031 | 0.938 ± 0.031 | 100 | 12,345 | 1.3e-06 |"
    assert f"|\n{row}\n\n{module.END}" in module.page({"guess_the_number-1": run})
    assert row not in module.page({})


def test_the_configuration_page_has_every_field_with_its_default_and_docstring(monkeypatch):
    module = script("config_reference", monkeypatch)
    source = '''
@dataclass
class Part:
    """A part."""

    size: int = 3
    """Its
    size."""

@dataclass
class Config:
    """The whole."""

    name: str
    part: Part = field(default_factory=Part)
    mode: Literal["a", "b"] = "a"
'''
    page = module.page(source)
    assert "| `part.size` | `int` | `3` | Its size. |" in page
    assert "| `name` | `str` | `required` |  |" in page
    assert "| `mode` | `'a', 'b'` | `'a'` |  |" in page


def test_the_command_line_page_is_up_to_date(monkeypatch):
    for name, value in {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    module = script("command_line", monkeypatch)
    assert module.PAGE.read_text() == module.page(), "run scripts/docs/command_line.py"


def test_the_models_page_shows_the_measured_figures(monkeypatch):
    module = script("models", monkeypatch)
    found = json.loads(module.DATA.read_text())
    assert module.PAGE.read_text() == module.page(found), "run scripts/docs/models.py --page"
    assert found.keys() == models.FAMILIES.keys(), "run scripts/docs/models.py"
    assert all(row[step] <= 1e-5 for row in found.values() for step in module.STEPS)


def test_the_table_of_the_exam_shows_the_measured_figures(monkeypatch):
    module = script("exam", monkeypatch)
    found = json.loads(module.DATA.read_text())
    shown = module.PAGE.read_text().partition(module.BEGIN)[2].partition(module.END)[0]
    assert shown.strip() == module.tables(found), "run scripts/docs/exam.py --page"
    assert len({row["fault"] for row in found["faults"]}) >= 65
    assert len(found["clean"]) >= 40


# -- links and paths ---------------------------------------------------------------------------------------------------


def anchors(page):
    """The anchors of a page's headings, as Python-Markdown makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower()) for title in titles}


@EACH_PAGE
def test_every_internal_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(there), f"{target}: {there.name} has no such heading"


PATH = re.compile(r"(?<![\w/.])(?:rl|rollout|trainer|recipes|scripts|tests|docs)/[\w./*-]*[\w*/]")


@EACH_PAGE
def test_every_path_that_a_page_names_exists(page):
    for path in sorted(set(PATH.findall(page.read_text()))):
        if "NAME" in path or "RECIPE" in path:
            continue
        there = [*ROOT.glob(path.rstrip("/")), *ROOT.glob(f"{path}.*")]  # `--out docs/data/x` names x.json and x.png
        assert there, f"{path} does not exist"


@EACH_PAGE
def test_every_excerpt_of_a_recipe_is_in_the_recipe(page):
    for file, code in re.findall(r'```\{?\.?python title="([^"]+)"\}?\n(.*?)```', page.read_text(), re.S):
        assert code in (ROOT / file).read_text(), f"{file} no longer holds:\n{code}"


# -- words -------------------------------------------------------------------------------------------------------------

SPEECH = re.compile(
    r"\b(says?|said|told|tells?|speaks?|beside|mend(?:s|ed)?|were it|goes on|of now|neither here)\b", re.I
)


@EACH_PAGE
def test_pages_are_in_plain_words(page):
    """CONTRIBUTING.md, Plain words: software does not speak, and no word that only a native reader knows."""
    if page in GENERATED:
        pytest.skip("its words are those of the code")
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S)
    assert [match.group() for match in SPEECH.finditer(text)] == []


# -- the site ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_without_a_network(tmp_path):
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT), "http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    assert built.stderr == ""
    pages = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "metrics/index.html", "reference/api/index.html"} <= pages
    for html in (tmp_path / "site").rglob("*.html"):
        outside = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', html.read_text())
        assert not outside, f"{html.name} loads {outside}"
