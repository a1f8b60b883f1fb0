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


def test_a_table_of_texts_is_at_the_left_by_its_own_tags_and_shown_whole():
    page = show.texts(pd.DataFrame({"in": ["a <td> b"], "out": ["long " * 40]})).data
    assert page.count('<td style="text-align: left">') == 2 and "<td>" not in page and "a &lt;td&gt; b" in page
    assert "long " * 39 in page
