"""show: the plots draw the numbers they are given, and the source shown is the source that runs."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from ftlab.classroom import show


def test_plot_curves_draws_each_series_and_returns_the_axes():
    _, ax = plt.subplots()
    assert show.plot_curves(ax, [1, 2, 3], {"train": [3, 2, 1], "held out": [3, 3, 3]}, "loss (nats/token)") is ax
    assert [list(line.get_ydata()) for line in ax.lines] == [[3, 2, 1], [3, 3, 3]]
    assert [line.get_color() for line in ax.lines] == [show.POLICY, show.REJECTED]
    assert ax.get_ylabel() == "loss (nats/token)" and ax.get_legend() is not None
    plt.close("all")


def test_show_source_shows_the_running_definition():
    fenced = show.show_source(show.plot_curves).data
    code = fenced.removeprefix("```python\n").removesuffix("```")
    assert len(fenced) - len(code) == len("```python\n```") and "```" not in code
    names = {"Axes": object, "Sequence": list, "POLICY": 0, "REJECTED": 0, "CHOSEN": 0, "REFERENCE": 0}
    exec(code, names)
    assert names["plot_curves"].__doc__ == show.plot_curves.__doc__
    assert names["plot_curves"].__code__.co_code == show.plot_curves.__code__.co_code


def test_live_curve_keeps_what_it_was_told(monkeypatch):
    drawn = []

    class Handle:
        def update(self, figure):
            drawn.append(figure)

    monkeypatch.setattr(show, "display", lambda *_, **__: Handle())
    curve = show.LiveCurve("t")
    curve({"step": 1, "max_steps": 4, "loss": 2.0})
    curve({"step": 2, "max_steps": 4, "eval_loss": 1.5})
    curve({"step": 4, "max_steps": 4, "train_runtime": 1.0})
    assert curve.losses == [(1, 2.0)] and curve.eval_losses == [(2, 1.5)] and len(drawn) == 3
    first, second = (figure.axes[0].lines for figure in drawn[:2])
    assert len(first) == 1 and len(second) == 2
    assert plt.get_fignums() == [], "a figure per record must not pile up in memory"


@pytest.fixture(autouse=True)
def _restore_style():
    with matplotlib.rc_context():
        yield


def test_bars_stand_in_the_order_given_with_their_intervals_and_ours_in_blue():
    ax = show.plot_scores(plt.figure().gca(), {"rules": (0.9, 0.8, 0.95), "tuned": (0.5, 0.4, 0.6)}, "right", ["tuned"])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["tuned", "rules"]  # from below: the first on top
    assert [bar.get_width() for bar in ax.patches] == [0.5, 0.9]
    assert [to_hex(bar.get_facecolor()).upper() for bar in ax.patches] == [show.POLICY, show.REFERENCE]
    assert [list(line.get_xdata()) for line in ax.lines] == [[0.4, 0.6], [0.8, 0.95]]


def test_a_size_curve_has_a_dot_a_seed_their_mean_the_controls_and_the_readers_own_run():
    ax = show.plot_against_rows(plt.figure().gca(), {200: [0.2, 0.4], 50: [0.1]}, {"rules": 0.96}, (100, 0.1, 0.2, 0.4))
    mean, dots, control, own = ax.lines[:4]
    assert [tuple(point) for point in mean.get_xydata()] == [(50, 0.1), (200, pytest.approx(0.3))]
    assert [tuple(point) for point in dots.get_xydata()] == [(50, 0.1), (200, 0.2), (200, 0.4)]
    assert set(control.get_ydata()) == {0.96} and tuple(own.get_xydata()[0]) == (100, 0.2)
    (bars,) = ax.collections
    assert [tuple(end) for end in bars.get_segments()[0]] == [(100, pytest.approx(0.1)), (100, pytest.approx(0.4))]


def test_each_seed_is_a_dot_and_the_mean_of_an_arm_a_bar():
    runs = pd.DataFrame({"arm": ["r=1", "full", "r=1"], "test": [0.2, 0.9, 0.4]})
    ax = show.plot_seeds(plt.subplots()[1], runs, ["r=1", "full"], "test", "right", grey=["full"])
    dots, bar, one, _ = ax.lines
    assert list(dots.get_ydata()) == [0.2, 0.4] and list(dots.get_xdata()) == [0, 0]
    assert list(bar.get_ydata()) == pytest.approx([0.3, 0.3]) and list(one.get_ydata()) == [0.9]
    assert [dots.get_color(), one.get_color()] == [show.POLICY, show.REFERENCE]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["r=1", "full"] and ax.get_ylabel() == "right"
