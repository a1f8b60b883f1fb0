"""What notebooks 04 and 06 show of the alignment runs: replies with their faults, and data/results/alignment.jsonl.

    replies_page(rows, {"before": [...], "after": [...]})      a table of texts, the wrong sentences marked
    runs = records("alignment")                                every line of the results file
    plot_frontier(axes, runs, arms)                            sampled gold against KL, and against seconds
    at(runs, "kl", (1, 2, 5))                                  the same as a table
    ahead(runs, "iterated dpo", "ppo", "kl", 2)                one arm minus another there

A run is a path: gold at each of its checkpoints. Of an arm's betas the best one is shown, by its gold at that point.
"""

import html
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats

from ftlab.classroom import seeds
from ftlab.classroom.show import CHOSEN, POLICY, REFERENCE, REJECTED
from ftlab.paths import DATA
from ftlab.tasks import replies

LOOKS = {  # arm -> (colour, line)
    "sft best": (REFERENCE, "-"), "sft chosen": (REFERENCE, "-."), "offline dpo": (POLICY, ":"),
    "on-policy dpo": (POLICY, "--"), "iterated dpo": (POLICY, "-"), "rloo": (CHOSEN, ":"), "ppo": (CHOSEN, "--"),
    "grpo": (CHOSEN, "-"), "grpo fast": (CHOSEN, "-."), "grpo gold": (REJECTED, "-"),
}  # fmt: skip

HACKED = ("proxy", "gold", "words", "kl")


# --- Replies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RepliesPage:
    """Tickets with one or more replies each: gold, what is missing, and the sentences that cost something."""

    tickets: list[str]
    columns: dict[str, list[tuple[str, dict]]]  # name -> (reply, label) of each ticket

    def __repr__(self) -> str:
        lines = []
        for i, ticket in enumerate(self.tickets):
            lines.append(ticket)
            for name, said in self.columns.items():
                reply, label = said[i]
                lacks = _lacks(reply, label)
                lines.append(f"   {name} ({replies.gold_reward(reply, label):.2f}{lacks and ', ' + lacks}): {reply}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        cell = "<td style='text-align:left;vertical-align:top'>{}</td>"
        head = "".join(f"<th style='text-align:left'>{html.escape(name)}</th>" for name in ["ticket", *self.columns])
        body = ""
        for i, ticket in enumerate(self.tickets):
            cells = [cell.format(html.escape(ticket))]
            for said in self.columns.values():
                reply, label = said[i]
                lacks = _lacks(reply, label)
                colour = REJECTED if lacks else CHOSEN
                note = f"{replies.gold_reward(reply, label):.2f}{lacks and ' ' + lacks}"
                cells.append(cell.format(f"{_marked(reply, label)}<br><small style='color:{colour}'>{note}</small>"))
            body += f"<tr>{''.join(cells)}</tr>"
        return f"<table><tr>{head}</tr>{body}</table>"


def replies_page(rows: Sequence[dict], columns: dict[str, Sequence[str]]) -> RepliesPage:
    """The replies of each column to the first rows, as many as there are; rows as `replies.as_pair` makes them."""
    first = [row for row, *_ in zip(rows, *columns.values(), strict=False)]
    labels, tickets = [row["ticket_label"] for row in first], [row["prompt"][-1]["content"] for row in first]
    return RepliesPage(tickets, {name: list(zip(said, labels, strict=False)) for name, said in columns.items()})


def _lacks(reply: str, label: dict) -> str:
    missing = [name for name, good in replies.score(reply, label).items() if not good]
    return f"lacks {', '.join(missing)}" if missing else ""


def _marked(reply: str, label: dict) -> str:
    """The reply in HTML; a sentence without which the reply would be worth more is marked."""
    mark, shown = "<mark style='background:#FBEBE0;color:#8a3c00'>{}</mark>", []
    sentences, whole = replies.sentences(reply), replies.gold_reward(reply, label)
    for i, sentence in enumerate(sentences):
        without = replies.gold_reward(" ".join(sentences[:i] + sentences[i + 1 :]), label)
        shown.append((mark if without > whole else "{}").format(html.escape(sentence)))
    return " ".join(shown)


# --- Results ----------------------------------------------------------------------------------------------------------


def records(name: str = "alignment") -> list[dict]:
    """The lines of data/results/<name>.jsonl, one a run."""
    lines = (DATA / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return list(map(json.loads, lines))


def start_gold(runs: Sequence[dict]) -> float:
    """Sampled gold of the start on the validation tickets: the mean of the seeds at temperature 1."""
    points = [point for run in final(runs, "temperature") for point in run["points"]]
    return statistics.mean(point["gold"] for point in points if point["temperature"] == 1)


def at(runs: Sequence[dict], column: str, values: Sequence[float], arms: Sequence[str] = tuple(LOOKS)) -> pd.DataFrame:
    """Gold where each arm's paths pass `column` ("kl", "cpu_seconds", "labels") = value: mean [95 % over seeds].

    At a KL: between two checkpoints, along the root of the KL, where the path first gets there. At seconds or labels:
    the last checkpoint that cost no more. A dash where not every seed gets so far.
    """
    table = {arm: {value: _best(runs, arm, column, value) for value in values} for arm in arms}
    return pd.DataFrame(table).T.rename_axis(column, axis=1)


def ahead(runs: Sequence[dict], arm: str, other: str, column: str, value: float) -> str:
    """Gold of one arm minus that of another where both pass `column` = value: mean [95 % over the seeds], paired.

    The seeds are those that both arms ran. Raises ValueError where one of the arms does not get so far.
    """
    mine, theirs = (_golds_at(runs, name, column, value) for name in (arm, other))
    both = mine.keys() & theirs.keys()
    if not both:
        raise ValueError(f"got seeds {[*mine]} of {arm} and {[*theirs]} of {other} at {column} = {value}, wanted some")
    return spread([mine[seed] - theirs[seed] for seed in both])


def _best(runs: Sequence[dict], arm: str, column: str, value: float) -> str:
    golds = _golds_at(runs, arm, column, value)
    return spread(list(golds.values())) if golds else "-"


def _golds_at(runs: Sequence[dict], arm: str, column: str, value: float) -> dict[int, float]:
    """seed -> gold there, at the arm's best beta among those with which every seed gets so far; else empty."""
    found = [golds for golds in _by_beta(runs, arm, column, value).values() if None not in golds.values()]
    return max(found, key=lambda golds: statistics.mean(golds.values()), default={})


def spread(values: Sequence[float]) -> str:
    """Mean [95 % interval of the mean, Student's t over the seeds]; one value: no interval."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.2f} (one seed)"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"


def _by_beta(runs: Sequence[dict], arm: str, column: str, value: float) -> dict[float | None, dict[int, float | None]]:
    """beta -> seed -> gold there, None where a path does not get so far."""
    start, found = start_gold(runs), {}
    for run in final(runs, arm):
        path = run.get("checkpoints") or run["points"]  # of a temperature, or of best of n: its points
        found.setdefault(run["beta"], {})[run["seed"]] = _along(path, column, value, start)
    return found


def final(runs: Sequence[dict], arm: str) -> list[dict]:
    """The runs of an arm of the comparison that count: its search is left out."""
    return [run for run in runs if run["arm"] == arm and run["phase"] == "final" and run["experiment"] == "comparison"]


def _point(checkpoint: dict) -> tuple[float, float]:
    return math.sqrt(max(checkpoint["kl"], 0)), checkpoint["gold"]


def _along(path: Sequence[dict], column: str, value: float, start: float) -> float | None:
    if column != "kl":
        paid = [point["gold"] for point in path if point.get(column, math.inf) <= value]
        return paid[-1] if paid else None
    before = (0.0, start)
    for point in path:
        here = _point(point)
        if here[0] >= math.sqrt(value) > before[0]:
            share = (math.sqrt(value) - before[0]) / (here[0] - before[0])
            return before[1] + share * (here[1] - before[1])
        before = here
    return None


def plot_frontier(axes: Sequence[Axes], runs: Sequence[dict], arms: Sequence[str]) -> None:
    """Sampled gold against the root of the KL to the start, and against processor seconds: a line an arm.

    A line is the mean of the seeds at the arm's best beta; small dots are the seeds at the last checkpoint. At the
    left, dashed grey is best of n, and the grey crosses are the start at lower temperatures.
    """
    left, right = axes
    for arm in arms:
        mine = _best_beta(runs, arm)
        colour, line = LOOKS[arm]
        beta = mine[0]["beta"]
        name = arm if beta is None else f"{arm}, beta {beta:g}"
        for ax, where, begin in ((left, _point, [(0, start_gold(runs))]), (right, _paid, [])):
            paths = [[where(p) for p in run["checkpoints"] if p["step"]] for run in mine]
            ax.plot(*zip(*begin, *map(_mean, zip(*paths, strict=True)), strict=True), line, marker="o", markersize=4,
                    color=colour, label=name)  # fmt: skip
            ax.plot(*zip(*(path[-1] for path in paths), strict=True), ".", color=colour, alpha=0.35)
    for arm, look in (("best of n", "--."), ("temperature", "x")):
        points = [point for run in final(runs, arm) for point in run["points"]]
        keys = list(dict.fromkeys(point.get("n", point.get("temperature")) for point in points))
        same = [
            [_point(point) for point in points if key in (point.get("n"), point.get("temperature"))] for key in keys
        ]
        left.plot(*zip(*map(_mean, same), strict=True), look, color=REFERENCE, label=arm)
    left.set(xlabel="square root of KL(policy || start) in nats an answer", ylabel="gold of sampled replies")
    left.set(xlim=(-0.1, None), ylim=(None, 1.03))
    right.set(xlabel="seconds of one processor core", ylim=left.get_ylim(), xlim=(0, None))
    handles, names = left.get_legend_handles_labels()
    right.legend(handles, names, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))


def _paid(checkpoint: dict) -> tuple[float, float]:
    return checkpoint["cpu_seconds"], checkpoint["gold"]


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    x, y = zip(*points, strict=True)
    return statistics.mean(x), statistics.mean(y)


def plot_hacking(axes: Sequence[Axes], runs: Sequence[dict]) -> None:
    """Proxy, gold and words over the steps of GRPO on two reward models; thin: the seeds, thick: their mean.

    Each reward model has a scale of its own, so the proxy is shown as its gain over the start.
    """
    labels = {"proxy": "gain in proxy", "gold": "gold", "words": "words of a reply"}
    for ax, (key, ylabel) in zip(axes, labels.items(), strict=True):
        for reward, colour in (("length", REJECTED), ("balanced", CHOSEN)):
            same = [r["checkpoints"] for r in runs if (r["experiment"], r["reward"]) == ("hacking", reward)]
            steps = [point["step"] for point in same[0]]
            zero = [path[0]["proxy"] if key == "proxy" else 0 for path in same]
            paths = [[point[key] - z for point in path] for path, z in zip(same, zero, strict=True)]
            for path in paths:
                ax.plot(steps, path, color=colour, alpha=0.3, linewidth=0.8)
            ax.plot(steps, [statistics.mean(at) for at in zip(*paths, strict=True)], color=colour, label=reward)
        ax.set(xlabel="step", ylabel=ylabel)
    axes[0].legend(title="reward model", fontsize=8)


def hacked(runs: Sequence[dict]) -> pd.DataFrame:
    """What GRPO changed from the first step to the last, for each reward model: mean [95 % over seeds]."""
    table = {}
    for reward in ("length", "balanced"):
        same = [r["checkpoints"] for r in runs if (r["experiment"], r["reward"]) == ("hacking", reward)]
        table[reward] = {key: spread([path[-1][key] - path[0][key] for path in same]) for key in HACKED}
    return pd.DataFrame(table).T.rename_axis("reward model")


# --- Against the start ------------------------------------------------------------------------------------------------


def against_start(runs: Sequence[dict], arms: Sequence[str], tickets: str = "hand") -> pd.DataFrame:
    """Gold of each arm minus gold of the start on the same tickets ("test" or "hand"), at the beta best on validation.

    Each entry: the mean and its interval over seeds and tickets (ftlab.classroom.seeds). "sampled" and "greedy" compare
    like with like; the last column is held against the start at temperature 0, the best that it can do for nothing.
    """
    sampled, greedy = _start_golds(final(runs, "temperature"), tickets)
    table = {}
    for arm in arms:
        mine = _best_beta(runs, arm)
        table[arm] = {"beta": mine[0]["beta"]} | _gains(mine, tickets, sampled, greedy)
        table[arm]["sampled, against greedy start"] = _gain(_golds(mine, tickets, "sampled") - greedy)
    return pd.DataFrame(table).T


def ablation(runs: Sequence[dict]) -> pd.DataFrame:
    """Gains on the test tickets from three starts: the old team's log, without its line of triage, good replies."""
    table = {}
    for start in ("log", "no line", "good replies"):
        same = [run for run in runs if run["start"] == start and run["phase"] == "final"]
        sampled, greedy = _start_golds([run for run in same if run["arm"] == "temperature"], "test")
        table[start] = {"start, sampled": f"{sampled.mean():.2f}", "start, greedy": f"{greedy.mean():.2f}"}
        for arm, beta in (("iterated dpo", 0.1), ("grpo gold", 0.04)):
            mine = [run for run in same if (run["arm"], run["beta"]) == (arm, beta)]
            gains = _gains(mine, "test", sampled, greedy)
            table[start] |= {f"{arm}, {kind}": gain for kind, gain in gains.items()}
    return pd.DataFrame(table).T.rename_axis("trained on")


def _start_golds(controls: Sequence[dict], tickets: str) -> list[np.ndarray]:
    """What the start's replies to each ticket are worth, at temperatures 1 and 0: the mean of the seeds."""
    points = [point for run in controls for point in run["points"]]
    return [np.mean([p[tickets] for p in points if p["temperature"] == t], 0) for t in (1.0, 0.0)]


def _golds(runs: Sequence[dict], tickets: str, kind: str) -> np.ndarray:
    return np.array([run[tickets][kind] for run in runs])  # (seeds, tickets)


def _gains(runs: Sequence[dict], tickets: str, sampled: np.ndarray, greedy: np.ndarray) -> dict[str, str]:
    starts = {"sampled": sampled, "greedy": greedy}
    return {kind: _gain(_golds(runs, tickets, kind) - start) for kind, start in starts.items()}


def _gain(gains: np.ndarray) -> str:
    return seeds.shown(seeds.interval(gains))


def _best_beta(runs: Sequence[dict], arm: str) -> list[dict]:
    """The final runs of an arm at the beta with the highest mean gold at the last checkpoint (validation tickets)."""
    betas: dict = {}
    for run in final(runs, arm):
        betas.setdefault(run["beta"], []).append(run)
    return max(betas.values(), key=lambda same: statistics.mean(run["checkpoints"][-1]["gold"] for run in same))
