"""show: the plots draw the numbers they are given."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from ftlab.classroom import show


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
