"""What the doctor leaves for its reader: doctor.json, doctor.html, the terminal, and the table of tokens."""

import importlib
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console

from rl import validate
from rl.config import Config, RolloutConfig, TrackingConfig
from rl.objectives import GRPO, GSPO, M2PO
from rl.objectives.corrections import TokenTIS
from rl.parity.evidence import Evidence, LayerError, SampleEvidence, WeightEvidence
from rl.parity.gap import NoiseClip, gap
from rl.sampling.truncation import Truncation
from rl.types import Batch, Data
from trainer.doctor import report as doctor_report
from trainer.doctor.check import ParityCheck, by_settings
from trainer.doctor.comparisons import Comparison
from trainer.doctor.doctor import DoctorReport, variations
from trainer.doctor.finding import Finding
from trainer.doctor.report import as_dict, bit_for_bit, save, show, token_table
from trainer.tracking.tracker import RunTracker

# Two prompts of three tokens, a reply of four and one of three; column t is about token t + 1.
IDS = torch.tensor([[1, 2, 3, 10, 11, 12, 13], [1, 2, 4, 20, 21, 22, 0]])
MASK = torch.tensor([[False, False, True, True, True, True], [False, False, True, True, True, False]])
ROLLOUT = torch.tensor([[0.0, 0.0, -1.0, -0.5, -2.0, -0.1], [0.0, 0.0, -3.0, -0.2, -0.7, 0.0]])
D = torch.tensor([[0.0, 0.0, 0.25, -0.5, 0.0, 0.125], [0.0, 0.0, -0.0625, 0.03125, 1.0, 0.0]])
FAULT = Finding(
    cause="temperature", severity="fault", where="engine 0", evidence="it samples at 0.9, the loss uses 0.8"
)
WARNING = Finding(cause="no_stop_ids", severity="warning", where="engine 0", evidence="no token ends a reply")


def make_batch(version: int = 0) -> Batch:
    versions = torch.where(MASK, version, -1)
    groups = torch.tensor([0, 1])
    return Batch(
        input_ids=IDS, mask=MASK, rollout_logprobs=ROLLOUT, versions=versions, rewards=torch.zeros(2), group_ids=groups
    )


def make_weights(**changes) -> WeightEvidence:
    digests = {"embed.weight": "aaaaaaaa", "norm.weight": "bbbbbbbb"}
    layers = [
        LayerError(name=name, kind="linear", error=error, scale=1.0)
        for name, error in (("layers.0.q_proj", 1e-6), ("layers.0.k_proj", math.nan), ("layers.0.v_proj", 3e-6))
    ]
    weights = WeightEvidence(engine=0, version=0, sent=digests, live=digests, received=[digests], layers=layers)
    return replace(weights, **changes)


def make_report(*findings: Finding, comparisons: bool = False, engines: int = 1, **settings) -> DoctorReport:
    """Engines whose numbers differ from the trainer's by D, or twice and thrice of it."""
    config = Config(name="small", model="models/none", data=lambda: Data(train=[]), reward=len, **settings)
    distances = [D * (i + 1) for i in range(engines)]
    gaps = [gap(ROLLOUT + d, ROLLOUT, MASK) for d in distances]
    sample = SampleEvidence(
        engine=0,
        gap=gaps[0],
        surprise=0.4,
        nonfinite=0,
        ended=2,
        ended_without_stop_token=0,
        wrong_version=0,
    )
    engine = {
        "temperature": 0.9,
        "top_p": 1.0,
        "penalties": [0.0, 0.0, 0.0],
        "chat_template": "x" * 5000,
        "prompt": [1, 2, 3],
    }
    evidence = Evidence(
        dtype=config.dtype,
        engine_facts=[engine] * engines,
        learner_facts={"temperature": 0.8, "truncation": Truncation(top_p=0.5)},
        driver_facts={"chat_template": "x" * 5000, "prompt": [1, 2, 3]},
        weights=[make_weights(engine=i) for i in range(engines)],
        samples=[replace(sample, engine=i, gap=g) for i, g in enumerate(gaps)],
        clip=NoiseClip(tokens=0.125, sequences=0.25),
        notes=["no reply ended by itself"],
    )
    check = ParityCheck(
        config=config,
        evidence=evidence,
        findings=list(findings),
        batches=[make_batch() for _ in distances],
        trainer=[ROLLOUT + d for d in distances],
        seconds=1.0,
    )
    ladder = [
        Comparison(name="rollout | trainer, as configured", gap=gaps[0]),
        Comparison(name="one prompt at a time | all at once", gap=gap(ROLLOUT[:1], ROLLOUT[:1], MASK[:1]), held=False),
        Comparison(name="prefix cache hit | miss", gap=None, note="the prefix cache is off"),
    ]
    return DoctorReport(
        config=config,
        check=check,
        comparisons=ladder if comparisons else [],
        findings=list(findings),
        seconds=8.1,
        stack={"python": "3.11.2", "torch": "2.13.0"},
    )


def decode(ids: list[int]) -> str:
    """Token 21 is dangerous, 22 has a line break."""
    return "".join({21: "<script>alert(1)</script>", 22: "\n"}.get(i, f" t{i}") for i in ids)


# -- doctor.json -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("findings", [(), (FAULT, WARNING)])
def test_doctor_json_comes_back_as_it_was_with_null_for_every_nan(tmp_path, findings):
    report = make_report(*findings, comparisons=True)
    save(report, tmp_path, decode)
    said = as_dict(report)
    assert json.loads((tmp_path / "doctor.json").read_text()) == said
    json.dumps(said, allow_nan=False)
    assert said["comparisons"][1]["gap"]["k1_se"] is None, "one sequence has no standard error"
    assert said["comparisons"][2]["gap"] is None
    assert said["verdict"] == ("fault" if findings else "well")
    assert [f["remedy"] for f in said["findings"]] == [f.remedy for f in findings]
    assert said["evidence"]["facts"]["learner"]["truncation"]["top_p"] == 0.5
    assert said["evidence"]["clip"] == {"tokens": 0.125, "sequences": 0.25}


def test_digests_are_counted_and_only_those_that_differ_are_named():
    sent = {"a": "11111111", "b": "22222222", "c": "33333333", "d": "44444444"}
    worker = {"a": "11111111", "b": "99999999", "d": "44444444"}
    weights = make_weights(sent=sent, live=sent | {"d": "55555555"}, received=[sent, worker])
    report = make_report()
    evidence = replace(report.check.evidence, weights=[weights])
    said = as_dict(replace(report, check=replace(report.check, evidence=evidence)))["evidence"]["weights"]
    expected = {"sent": 4, "equal": 1, "moved": ["d"], "lost": ["c"], "changed": ["b"]}
    assert said[0]["digests"] == expected
    assert "11111111" not in json.dumps(said)
    assert bit_for_bit(replace(weights, received=[])) == 0, "what was not received is not equal"


def test_the_worst_layers_come_first_and_one_without_a_number_is_the_worst():
    layers = as_dict(make_report())["evidence"]["weights"][0]["worst_layers"]
    assert [(x["name"], x["error"]) for x in layers] == [
        ("layers.0.k_proj", None),
        ("layers.0.v_proj", 3e-6),
        ("layers.0.q_proj", 1e-6),
    ]


# -- doctor.html -------------------------------------------------------------------------------------------------------

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Walk(HTMLParser):
    """Checks that tags are balanced, and collects texts, ids, and what would be loaded or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.texts).split())

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} has a script in {name}"
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "srcset", "data", "poster", "action"):
                self.references.append(value)
            if "url(" in (value or ""):
                self.references += [part.split(")")[0] for part in value.split("url(")[1:]]

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
        else:
            self.texts.append(data)


def page_of(report: DoctorReport, folder) -> tuple[Walk, str]:
    save(report, folder, decode)
    html = (folder / "doctor.html").read_text(encoding="utf-8")
    return Walk(html), html


def test_the_page_says_the_verdict_each_remedy_each_comparison_and_what_was_not_covered(tmp_path):
    walk, _ = page_of(make_report(FAULT, WARNING, comparisons=True), tmp_path)
    assert "Engines and trainer do not agree: temperature." in walk.text
    for f in (FAULT, WARNING):
        assert f.remedy in walk.text
        assert f"{f.cause}, {f.where} {f.evidence[0].upper()}{f.evidence[1:]}." in walk.text
    for comparison in make_report(comparisons=True).comparisons:
        # In the table; where there are numbers also in the plot.
        assert walk.text.count(comparison.name) == (2 if comparison.gap else 1)
    assert "the prefix cache is off" in walk.text
    for check, covers, _ in make_report().coverage():
        assert check in walk.text
        assert covers in walk.text
    assert "No reply ended by itself." in walk.text
    assert "torch 2.13.0" in walk.text
    assert "5000 long, sha256" in walk.text, "a chat template is too long to show"
    assert "old_logprobs is" not in walk.text, "nothing is settled for a run that may not start"


def test_rows_stand_out_where_a_comparison_failed_and_where_two_sides_say_different_things(tmp_path):
    findings = [
        replace(FAULT, where=make_report(comparisons=True).comparisons[0].name),
        replace(WARNING, where="prefix cache hit | miss"),
    ]
    _, html = page_of(make_report(*findings, comparisons=True), tmp_path)
    red = re.findall(r"<tr class=bad><td[^>]*>([^<]*)", html)
    assert red == ["rollout | trainer, as configured", "temperature", "top_p"]


def test_a_well_page_says_so_with_its_numbers_and_how_old_logprobs_was_settled(tmp_path):
    walk, _ = page_of(make_report(), tmp_path)
    assert "Engines and trainer agree: mean |d| 2.8e-01 nats over 7 tokens" in walk.text
    assert "old_logprobs is recompute: noise alone would clip 25% of GSPO's sequences." in walk.text
    assert "This is the short form" in walk.text


def test_the_page_loads_nothing_runs_nothing_and_its_plots_do_not_mix_up_their_parts(tmp_path):
    walk, html = page_of(make_report(FAULT, comparisons=True), tmp_path)
    assert walk.tags.isdisjoint({"script", "link", "img", "image", "iframe", "object", "base"})
    assert "http:" not in html
    assert "https:" not in html
    assert walk.references, "plots refer to their own marks"
    assert {r[0] for r in walk.references} == {"#"}
    assert {r[1:] for r in walk.references} <= set(walk.ids)
    assert len(set(walk.ids)) == len(walk.ids)


def test_text_of_tokens_and_names_is_shown_and_never_becomes_markup(tmp_path):
    fault = replace(FAULT, evidence="engine says <b>bold</b> & [red]x[/red]")
    report = make_report(fault, comparisons=True)
    comparisons = [
        *report.comparisons,
        Comparison(name="<i>one</i> | $x$", gap=report.comparisons[0].gap, note="<u>"),
    ]
    walk, _ = page_of(replace(report, comparisons=comparisons), tmp_path)
    assert walk.tags.isdisjoint({"b", "i", "u", "script"})
    for shown in ("<script>alert(1)</script>", "<b>bold</b> & [red]x[/red]", "<u>"):
        assert shown in walk.text
    assert walk.text.count("<i>one</i> | $x$") == 2


@pytest.mark.slow
def test_a_plot_by_weight_version_appears_once_there_are_two(tmp_path):
    one = make_report(engines=2)
    batches = [make_batch(0), make_batch(1)]
    two = replace(one, check=replace(one.check, batches=batches))
    assert "d by the weight version" not in page_of(one, tmp_path)[0].text
    assert "d by the weight version" in page_of(two, tmp_path)[0].text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "unit"), [(GSPO(), "Mean log-ratio of each sequence"), (GRPO(), "Log-ratio of each token")]
)
def test_the_clip_range_is_held_against_what_the_objective_clips(tmp_path, objective, unit):
    walk, _ = page_of(make_report(objective=objective), tmp_path)
    assert f"{unit}; between the lines {type(objective).__name__} does not clip." in walk.text


def test_a_page_is_written_even_if_the_trainer_has_no_finite_number(tmp_path):
    report = make_report(FAULT)
    broken = replace(report, check=replace(report.check, trainer=[ROLLOUT * math.nan]))
    walk, _ = page_of(broken, tmp_path)
    assert "do not agree" in walk.text
    assert "svg" not in walk.tags


# -- the terminal ------------------------------------------------------------------------------------------------------


def shown(monkeypatch, report: DoctorReport, width: int = 240, **options) -> str:
    console = Console(soft_wrap=True, record=True, width=width, file=io.StringIO())
    monkeypatch.setattr(doctor_report, "console", console)
    show(report, **options)
    return console.export_text(styles=True)


def plain(text: str) -> str:
    return "".join(part.partition("m")[2] if i else part for i, part in enumerate(text.split("\x1b[")))


def test_a_well_run_gets_one_line_and_how_old_logprobs_was_settled(monkeypatch):
    # Of the seven d, mean |d| = (1/4 + 1/2 + 0 + 1/8 + 1/16 + 1/32 + 1) / 7 = 0.28, and k3 = mean(e^d - 1 - d) = 0.12.
    expected = [
        "engines and trainer agree: mean |d| 2.8e-01 nats over 7 tokens, k3 1.2e-01, 2 tensors bit for bit, "
        "3 layers; 8.1 s",
        "old_logprobs: recompute, because noise alone would clip 25% of GSPO's sequences",
    ]
    assert plain(shown(monkeypatch, make_report())).splitlines() == expected
    assert plain(shown(monkeypatch, make_report(old_logprobs="rollout"))).splitlines() == expected[:1]


def test_a_correction_has_the_old_log_probabilities_recomputed_for_else_it_would_see_no_gap():
    check = make_report().check
    quiet = replace(check, evidence=replace(check.evidence, clip=NoiseClip(tokens=0.0, sequences=0.0)))
    assert quiet.old_logprobs()[0] == "rollout"
    corrected = replace(quiet, config=replace(quiet.config, correction=TokenTIS()))
    assert corrected.old_logprobs() == ("recompute", "TokenTIS compares the trainer's own with the engine's")


def test_noise_decides_only_where_the_settings_leave_it_open():
    config = replace(make_report().config, old_logprobs="auto", max_staleness=0, objective=GSPO())
    assert by_settings(config) is None
    for changed, source in (
        ({"old_logprobs": "rollout"}, "rollout"),
        ({"max_staleness": 2}, "recompute"),
        ({"correction": TokenTIS()}, "recompute"),
        ({"objective": M2PO()}, "recompute"),
    ):
        settled = by_settings(replace(config, **changed))
        assert settled is not None
        assert settled[0] == source


def test_of_several_engines_the_worst_is_told(monkeypatch):
    text = plain(shown(monkeypatch, make_report(engines=3)))
    assert "mean |d| 8.4e-01 nats over 7 tokens on the worst of 3 engines" in text
    assert "6 tensors bit for bit, 9 layers" in text


def test_a_fault_is_a_red_block_and_a_warning_a_yellow_line_with_cause_and_remedy(monkeypatch):
    text = shown(monkeypatch, make_report(FAULT, WARNING))
    assert "agree: mean" not in text
    assert "old_logprobs" not in text
    blocks = [line for line in text.splitlines() if "\x1b[31m" in line or "\x1b[1;31m" in line]
    assert [plain(b).strip() for b in blocks] == [
        "engines and trainer do not agree: temperature; 8.1 s",
        "fault: temperature, engine 0",
        "evidence: it samples at 0.9, the loss uses 0.8",
        f"remedy: {FAULT.remedy}",
    ]
    yellow = [plain(line) for line in text.splitlines() if "\x1b[33m" in line]
    assert yellow == [f"warning: no_stop_ids (engine 0): no token ends a reply. {WARNING.remedy}"]


@pytest.mark.parametrize("width", [80, 120, 240])
def test_the_full_form_shows_every_comparison_check_and_the_worst_token_at_any_width(monkeypatch, width):
    text = plain(shown(monkeypatch, make_report(FAULT, comparisons=True), width=width, decode=decode))
    words = set(text.replace("│", " ").replace("┃", " ").split())
    # Mean, largest, no difference, 1 of 7 ratios outside, no standard error; then words at the ends of wrapped cells.
    shown_words = {"2.8e-01", "1.0e+00", "0.0e+00", "14.29%", "n/a", "configured", "miss", "off", "draws", "sigmas"}
    assert shown_words <= words, shown_words - words
    assert "nan" not in words
    lines = [line for line in text.splitlines() if set(line) & set("│┃")]
    assert max(map(len, lines)) <= width, "no table is wider than the terminal"
    assert "noise alone would clip 12.50% of tokens, 25.00% of sequences (GSPO)" in text
    assert "worst token: '\\n' after ' t1 t2 t4 t20<script>alert(1)</script>': engine -0.7000, trainer 0.3000" in text
    assert "not covered: no reply ended by itself" in text
    assert FAULT.remedy in text


# -- the tokens --------------------------------------------------------------------------------------------------------


def test_the_table_of_tokens_keeps_the_largest_differences_with_what_stands_before():
    rows = token_table(make_report(), decode, most=3)
    assert [round(r["d"], 5) for r in rows] == [1.0, -0.5, 0.25]
    assert rows[1] | {"rollout_logprob": 0, "trainer_logprob": 0} == {
        "engine": 0,
        "sequence": 0,
        "position": 1,
        "token": " t11",
        "context": " t1 t2 t3 t10",
        "rollout_logprob": 0,
        "trainer_logprob": 0,
        "d": -0.5,
        "version": 0,
    }
    assert (rows[1]["rollout_logprob"], rows[1]["trainer_logprob"]) == (-0.5, -1.0)


def test_without_a_cap_every_sampled_token_of_every_engine_is_a_row():
    rows = token_table(make_report(engines=2), decode)
    assert sorted((r["engine"], r["sequence"], r["position"]) for r in rows) == [
        (engine, row, t) for engine in (0, 1) for row, length in ((0, 4), (1, 3)) for t in range(length)
    ]
    assert rows[0]["engine"] == 1, "its differences are twice as large"


def test_a_token_that_the_trainer_has_no_number_for_counts_as_the_largest_difference():
    report = make_report()
    trainer = ROLLOUT + D
    trainer[0, 4] = math.nan
    rows = token_table(replace(report, check=replace(report.check, trainer=[trainer])), decode, most=1)
    assert (rows[0]["sequence"], rows[0]["position"]) == (0, 2)


class Tables:
    """A tracker that keeps tables."""

    def __init__(self):
        self.tables = []

    def begin(self, run):
        pass

    def log(self, step, values):
        pass

    def table(self, step, name, rows):
        self.tables.append((step, name, rows))

    def end(self, status, summary):
        pass


def test_trackers_get_the_tokens_under_the_current_step_where_the_user_wants_it_and_nobody_else_does(tmp_path):
    rows = token_table(make_report(), decode, most=2)
    for upload in (False, True):
        kept, folder = Tables(), tmp_path / str(upload)
        config = TrackingConfig(to=(), upload_samples=upload)
        tracker = RunTracker(folder=folder, config=config, name="t", settings={}, trackers={"kept": lambda k=kept: k})
        tracker.table("doctor", [])
        tracker.table("doctor", rows)
        tracker.log(3, {})
        tracker.table("doctor", rows)
        tracker.close({})
        assert sorted(p.name for p in folder.iterdir()) == ["metrics.jsonl", "samples.jsonl"]
        assert kept.tables == ([(0, "doctor", rows), (3, "doctor", rows)] if upload else [])


@pytest.mark.parametrize("recipe", ["quickstart", "quickstart_grpo"])
def test_every_variation_of_a_recipe_is_one_that_a_run_may_have(recipe, monkeypatch):
    monkeypatch.syspath_prepend("recipes")
    config = replace(importlib.import_module(recipe).config, device="cpu")
    tried = dict(variations(config))
    for name in ("bfloat16 body, float32 heads", "bfloat16 body, bfloat16 heads"):
        other = tried[f"rollout | trainer, {name}"]
        assert isinstance(other, Config), other
        validate.check(other)
    assert tried["rollout | trainer, compiled"] == "compiling for a CPU takes minutes"


def test_a_variation_that_no_run_may_have_is_left_out_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    config = Config(
        name="t",
        model=str(tmp_path),
        data=lambda: Data(train=[]),
        reward=lambda reply: 0.0,
        dtype="float32",
        device="cpu",
        rollout=RolloutConfig(top_p=0.9),
    )
    assert dict(variations(config))["rollout | trainer, bfloat16 body, float32 heads"].startswith("not possible: trunc")
