"""The curves of a run: its own metrics, in their own range."""

import math

import pytest

from trainer.pages import curves
from trainer.pages.curves import panels, plot


def rows(**figures):
    """Twenty steps, each figure a function of the step; __ is / in names."""
    return [
        {"step": float(s), **{name.replace("__", "/"): float(f(s)) for name, f in figures.items()}}
        for s in range(1, 21)
    ]


def test_a_run_has_the_panels_of_its_own_metrics_and_no_empty_one():
    history = rows(
        reward__mean=lambda s: 0.0,
        reward__right__mean=lambda s: s / 20,
        reward__format__mean=lambda s: 1.0,
        actor__entropy=lambda s: math.nan,
        staleness__max=lambda s: 0.0,
        queue__ready=lambda s: s,
    )
    found = panels(history)
    assert list(found) == ["reward", "parts of the reward", "groups under way"]
    assert list(found["parts of the reward"]) == ["reward/right/mean", "reward/format/mean"]
    assert found["reward"]["reward/mean"][0][:2] == (1.0, 0.0), "a reward of 0 is news"


def test_a_line_has_the_error_of_its_figure_where_that_is_known():
    history = [{"step": 1.0, "reward/mean": 0.5, "reward/mean_se": 0.1}, {"step": 2.0, "reward/mean": 0.5}]
    (first, second) = panels(history)["reward"]["reward/mean"]
    assert first == (1.0, 0.5, 0.1)
    assert second[:2] == (2.0, 0.5)
    assert math.isnan(second[2])


class Axis:
    def __init__(self):
        self.range, self.scale = None, None

    def set_ylim(self, low, high):
        self.range = (low, high)

    def set_yscale(self, scale):
        self.scale = scale


@pytest.mark.parametrize(
    ("values", "limits", "scale"),
    [
        ([0.1, 0.9], (-0.02, 1.02), None),
        ([-0.5, 0.9], None, None),
        ([0.5, 40.0], None, "log"),
        ([3.0, 7.0], None, None),
        ([1e-7, 3e-7], None, None),
        ([0.0, 0.0], None, None),
        ([-1.0, -0.5], None, None),
    ],
)
def test_a_reward_outside_0_and_1_is_seen(values, limits, scale):
    axis = Axis()
    curves._scale(axis, values)
    assert (axis.range, axis.scale) == (limits, scale)


@pytest.mark.slow
def test_the_picture_shows_the_values_and_the_alerts(tmp_path, monkeypatch):
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    history = rows(reward__mean=lambda s: -3 + s, reward__mean_se=lambda s: 0.2, actor__entropy=lambda s: 2 / s)
    plot(history, tmp_path / "a.png", "t", [{"step": 7, "title": "x", "text": "y"}, {"step": -1}])
    (figure,) = drawn
    reward = next(axis for axis in figure.axes if axis.get_title() == "reward")
    low, high = reward.get_ylim()
    assert low < -2
    assert high > 17
    assert [line.get_xdata()[0] for line in reward.lines if line.get_color() == "tab:red"] == [7]
    assert sum(axis.get_visible() for axis in figure.axes) == 2
    monkeypatch.undo()
    plot([], tmp_path / "empty.png", "t")
    assert (tmp_path / "empty.png").stat().st_size > 1000
