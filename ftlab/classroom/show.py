"""What a notebook shows: the house style of plots, and scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib_inline.backend_inline import set_matplotlib_formats

if TYPE_CHECKING:
    from pandas import DataFrame

# One meaning per colour, all course long; a set that colour-blind readers can tell apart (Okabe & Ito).
POLICY, REFERENCE, CHOSEN, REJECTED, LIBRARY = "#0072B2", "#7F7F7F", "#009E73", "#D55E00", "#000000"


def house_style() -> None:
    """The look of house.mplstyle for every figure from here on; in a notebook, twice as sharp."""
    plt.style.use(Path(__file__).with_name("house.mplstyle"))
    if get_ipython() is not None:
        set_matplotlib_formats("retina")


def texts(frame: DataFrame) -> HTML:
    """A table of texts, whole and at the left edge, by a style of each cell: GitHub drops style sheets."""
    import pandas as pd

    with pd.option_context("display.max_colwidth", None):
        page = frame.to_html(justify="left")
    return HTML(page.replace("<td>", '<td style="text-align: left">'))


def plot_scores(ax: Axes, scores: dict[str, tuple[float, float, float]], xlabel: str, ours: Sequence[str] = ()) -> Axes:
    """Horizontal bars of (mean, low, high), the first on top, each with its 95% interval; `ours` in blue, else grey."""
    for y, (name, (mean, low, high)) in enumerate(reversed(scores.items())):
        ax.barh(y, mean, color=POLICY if name in ours else REFERENCE, height=0.62)
        ax.plot([low, high], [y, y], color=LIBRARY, linewidth=1.2)
        ax.text(high + 0.015, y, f"{mean:.0%}", va="center", fontsize=9)
    ax.set(yticks=range(len(scores)), yticklabels=reversed(scores))
    ax.set(xlabel=xlabel, xlim=(0, 1.1), xticks=[0, 0.25, 0.5, 0.75, 1])
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    return ax
