"""Advice is an instrument: planted causes are named, odd runs are left alone, and each figure has its error."""

import math
import random

import pytest

from rl.parity.advice import advise
from rl.parity.trends import Estimate, above, change, estimate, turned
from synthetic_runs import CAUSES, ODD, causes_named, clean, planted, wanted


def report(runs):
    """Planted runs that are missed, and names that are wrong, by the run's name."""
    missed, wrong = {}, {}
    for made in runs:
        named = causes_named(made, advise)
        if made.cause and wanted(made) not in named:
            missed[made.name] = named
        if extra := named - {wanted(made)}:
            wrong[made.name] = extra
    return missed, wrong


def examined(runs, capsys):
    runs = list(runs)
    missed, wrong = report(runs)
    with capsys.disabled():
        hits = sum(bool(r.cause) for r in runs) - len(missed)
        print(f"\n{len(runs)} runs: {hits} of {hits + len(missed)} causes named, {len(wrong)} runs with a wrong name")
        for name, named in [*missed.items(), *wrong.items()]:
            print("   ", name, named)
    return runs, missed, wrong


def test_planted_causes_are_named_and_no_other(capsys):
    runs, missed, wrong = examined(map(planted, range(5 * len(CAUSES))), capsys)
    assert len(missed) <= 0.04 * len(runs), missed
    assert len(wrong) <= 0.02 * len(runs), wrong


def test_odd_runs_that_nothing_holds_back_get_no_advice(capsys):
    runs, _, wrong = examined(map(clean, range(5 * len(ODD))), capsys)
    assert len(wrong) <= 0.02 * len(runs), wrong


@pytest.mark.nightly
def test_the_rates_over_many_seeds(capsys):
    runs, missed, wrong = examined(map(planted, range(1000, 1000 + 100 * len(CAUSES))), capsys)
    assert len(missed) <= 0.02 * len(runs)
    assert len(wrong) <= 0.02 * len(runs)
    runs, _, wrong = examined(map(clean, range(1000, 1000 + 100 * len(ODD))), capsys)
    assert len(wrong) <= 0.01 * len(runs)


@pytest.mark.parametrize("kind", sorted(CAUSES))
def test_each_advice_states_its_figure_its_error_its_step_and_its_setting(kind):
    seed = next(
        s for s in range(1000) if planted(s).cause == kind and wanted(planted(s)) in causes_named(planted(s), advise)
    )
    made = planted(seed)
    found = next(a for a in advise(made.rows, made.settings, made.idle_s) if a.cause == wanted(made))
    assert f"since step {found.figure.since}: " in found.text
    assert found.metric in found.text
    assert "±" in found.text
    assert found.setting.endswith(".")
    assert math.isfinite(found.figure.value)
    assert math.isfinite(found.figure.error)
    if made.since is not None:
        steps = len(made.rows) - 1
        assert abs(found.figure.since - made.since) <= max(3, 0.1 * steps), (found.figure.since, made.since)


def test_the_error_of_a_mean_covers_the_truth_also_where_neighbouring_steps_move_together():
    for memory in (0.0, 0.6):
        inside, rng = 0, random.Random(1)
        for _ in range(400):
            x, series = 0.0, []
            for step in range(60):
                x = memory * x + rng.gauss(0, 1)
                series.append((step, x))
            found = estimate(series)
            inside += abs(found.value) < 3 * found.error
        assert inside / 400 > 0.95, memory


def test_a_figure_is_above_a_bound_only_from_where_it_stays_there():
    series = [(s, 0.2) for s in range(1, 11)] + [(s, 0.9) for s in range(11, 31)]
    assert above(series, 0.5) == Estimate(value=0.9, error=0.0, since=11)
    assert above(series[:14], 0.5) is None, "four steps are too few"
    assert above([*series, (31, 0.1), (32, 0.1), (33, 0.1)], 0.5) is None, "it is over"
    assert above([*series[:20], (21, 0.0), *series[20:]], 0.5).since == 11, "one odd step changes nothing"


def test_a_change_has_an_error_and_the_step_of_its_middle():
    series = [(s, 1.0 if s < 20 else 5.0) for s in range(40)]
    found = change(series)
    assert (found.value, found.error) == (4.0, 0.0)
    assert turned(series, found) == 20
    assert change(series[:11]) is None


def test_no_row_and_rows_without_a_step_give_no_advice():
    assert advise([], {}) == []
    assert advise([{"step": 0.0, "eval/a/avg@1": 1.0}] * 40, {}) == []
    assert advise([{"step": float(s), "reward/mean": None} for s in range(40)], {}) == []
