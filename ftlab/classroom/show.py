"""What a notebook shows: the house style of plots, and scores."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# One meaning per colour, all course long; a set that colour-blind readers can tell apart (Okabe & Ito).
POLICY, REFERENCE, CHOSEN, REJECTED, LIBRARY = "#0072B2", "#7F7F7F", "#009E73", "#D55E00", "#000000"


def house_style() -> None:
    """The look of house.mplstyle for every figure from here on."""
    plt.style.use(Path(__file__).with_name("house.mplstyle"))


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


def plot_against_rows(ax: Axes, curve: dict[int, Sequence[float]], lines: dict[str, float], live: tuple) -> Axes:
    """Right answers against training rows seen: a dot a seed and the mean as a line, controls as dashed lines.

    curve: rows -> the share of right answers of each seed. live: (rows, low, mean, high) of a run of one's own.
    """
    rows = sorted(curve)
    ax.plot(rows, [sum(curve[n]) / len(curve[n]) for n in rows], color=POLICY, label="fine-tuned: mean of the seeds")
    ax.plot(*zip(*[(n, y) for n in rows for y in curve[n]], strict=True), "o", color=POLICY, markersize=3)
    for name, y in lines.items():
        ax.axhline(y, color=REFERENCE, linestyle="--", linewidth=1)
        under = any(0 < other - y < 0.07 for other in lines.values())  # above it stands the name of the next line
        shift, side = (-2, "top") if under else (2, "bottom")
        ax.annotate(name, (rows[-1], y), (0, shift), textcoords="offset points", ha="right", va=side, fontsize=8)
    n, low, mean, high = live
    ax.errorbar([n], [mean], [[mean - low], [high - mean]], color=REJECTED, marker="o", capsize=3, label="your run")
    ax.set(xlabel="training rows, each seen once", xscale="log", xticks=rows, xticklabels=rows)
    ax.set(ylabel="right on the hand test", ylim=(-0.02, 1.04))
    ax.minorticks_off()
    ax.legend(loc="center left", fontsize=8)
    return ax


def plot_seeds(ax: Axes, runs, arms: Sequence[str], y: str, ylabel: str, grey: Sequence[str] = ()) -> Axes:
    """A dot a seed and a bar at the mean for each arm; `runs` is a DataFrame with a column "arm" and a column y."""
    for x, arm in enumerate(arms):
        values, colour = runs.loc[runs["arm"] == arm, y], REFERENCE if arm in grey else POLICY
        ax.plot([x] * len(values), values, "o", color=colour, alpha=0.4, markersize=5)
        ax.plot([x - 0.25, x + 0.25], [values.mean()] * 2, color=colour, linewidth=2)
    ax.set(xticks=range(len(arms)), xticklabels=arms, ylabel=ylabel)
    return ax
