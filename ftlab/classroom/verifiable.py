"""What notebook 07 shows of data/results/verifiable.jsonl: GRPO with a check as its reward, and what it has to beat.

    runs = alignment.records("verifiable")
    plot_race(ax, runs)                 right answers on validation questions, over seconds of one core
    table(runs, "test")                 each arm against the start: pass@1, pass@8, greedy
    against(runs, "grpo")               one arm minus the others, question by question and seed by seed
    plot_pass(axes, runs)               pass@k over k
    plot_cheated(axes, runs)            the reward and the truth, of three checks

`hits` of a question: how many of its 8 samples are right. Intervals are 95 % over seeds and questions
(ftlab.classroom.seeds), with a star where they leave out 0.
"""

import statistics
from collections.abc import Sequence
from math import comb

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ftlab.classroom import alignment, seeds
from ftlab.classroom.show import CHOSEN, LIBRARY, POLICY, REFERENCE, REJECTED

SAMPLES = 8
LOOKS = {  # arm -> (colour, line)
    "grpo": (POLICY, "-"), "rejection": (REFERENCE, "--"), "more sft": (REFERENCE, "-"), "distill": (CHOSEN, "-"),
    "sft teacher": (CHOSEN, "--"),
}  # fmt: skip
MAIN = tuple(LOOKS)
CHECKS = {"grpo": "all ten tables", "grpo one table": "the first table", "grpo any rows": "it returns a row"}


def pass_at(hits: Sequence[int], k: int, n: int = SAMPLES) -> np.ndarray:
    """pass@k of each question, (questions,): the chance that one of k answers is right, given the hits of n >= k.

    1 - C(n - hits, k) / C(n, k), unbiased. Source: Chen et al. 2021, arXiv:2107.03374, Eq. 1.
    """
    return np.array([1 - comb(n - int(hit), k) / comb(n, k) for hit in hits])


def final(runs: Sequence[dict], arm: str) -> list[dict]:
    """The final runs of an arm, by seed."""
    mine = [run for run in runs if (run["arm"], run["phase"]) == (arm, "final")]
    return sorted(mine, key=lambda run: run["seed"])


def start(runs: Sequence[dict], questions: str, what: str) -> np.ndarray:
    """The start's share right, (questions,): `what` is pass@k or greedy; questions is "test" or "hand"."""
    (run,) = final(runs, "temperature")
    (point,) = (point for point in run["points"] if point["temperature"] == 1)
    return _right(point[questions], what)


def _right(found: dict, what: str) -> np.ndarray:
    return np.array(found["greedy"]) if what == "greedy" else pass_at(found["hits"], int(what.removeprefix("pass@")))


def values(runs: Sequence[dict], arm: str, questions: str, what: str) -> np.ndarray:
    """(seeds, questions): the share right in each final run of an arm."""
    return np.array([_right(run[questions], what) for run in final(runs, arm)])


def gains(runs: Sequence[dict], arm: str, questions: str, what: str) -> np.ndarray:
    """(seeds, questions): `values` minus the share right of the start that the arm began from."""
    other = [run["start"] for run in final(runs, arm) if "start" in run]
    before = _right(other[0][questions], what) if other else start(runs, questions, what)
    return values(runs, arm, questions, what) - before


def table(runs: Sequence[dict], questions: str = "test", arms: Sequence[str] = MAIN) -> pd.DataFrame:
    """Each arm minus the start, and its KL and steps; the first row is the start itself."""
    kinds = ("pass@1", "pass@8", "greedy")
    found = {"the start": {what: f"{start(runs, questions, what).mean():.3f}" for what in kinds}}
    for arm in arms:
        if not (mine := final(runs, arm)):
            continue
        found[arm] = {what: seeds.shown(seeds.interval(gains(runs, arm, questions, what))) for what in kinds}
        found[arm]["KL"] = f"{statistics.mean(run['checkpoints'][-1]['kl'] for run in mine):.2f}"
        found[arm]["steps"] = f"{statistics.mean(run['checkpoints'][-1]['step'] for run in mine):.0f}"
    return pd.DataFrame(found).T.fillna("")


def free(runs: Sequence[dict], questions: str = "test") -> pd.DataFrame:
    """What the start gains without training: lower temperatures, and the result that most of 8 answers return."""
    (run,), (vote,) = final(runs, "temperature"), final(runs, "majority")
    found = {f"temperature {p['temperature']:g}": {"right": np.mean(_right(p[questions], "pass@1")),
                                                   "pass@8": np.mean(_right(p[questions], "pass@8"))}
             for p in run["points"]}  # fmt: skip
    found["majority of 8"] = {"right": np.mean(vote[questions]["chosen"])}
    return pd.DataFrame(found).T.round(3)


def against(runs: Sequence[dict], arm: str, others: Sequence[str], what: str = "pass@1") -> pd.DataFrame:
    """The arm minus each of the others, on the seeds that both have: test questions and hand test."""
    found = {}
    for other in others:
        common = {run["seed"] for run in final(runs, arm)} & {run["seed"] for run in final(runs, other)}
        both = [run for run in runs if run["seed"] in common]
        found[f"minus {other}"] = {"test": "-", "hand": "-"}
        for questions in ("test", "hand") if common else ():
            difference = values(both, arm, questions, what) - values(both, other, questions, what)
            found[f"minus {other}"][questions] = seeds.shown(seeds.interval(difference))
    return pd.DataFrame(found).T


def plot_race(ax: Axes, runs: Sequence[dict], arms: Sequence[str]) -> Axes:
    """Right answers to validation questions over processor seconds: a line an arm, mean and range of its seeds.

    Rejection sampling and SFT on a teacher's answers pay for these answers before their first step.
    """
    for arm in arms:
        first = (0.0, paid_at_start(runs)["grpo"])
        paths = [run["checkpoints"] for run in final(runs, arm)]
        if not (points := [[first, *((point["cpu_seconds"], point["right"]) for point in path)] for path in paths]):
            continue
        seconds, rights = np.array(points).transpose(2, 0, 1)  # (seeds, checkpoints) each
        colour, line = LOOKS[arm]
        mean = rights.mean(0)
        spread = [mean - rights.min(0), rights.max(0) - mean]
        ax.errorbar(seconds.mean(0), mean, spread, color=colour, linestyle=line, marker="o", capsize=3, label=arm)
    ax.set(xlabel="seconds of one core", ylabel="right, sampled (validation)")
    ax.legend(fontsize=8)
    return ax


def plot_pass(axes: Sequence[Axes], runs: Sequence[dict], arms: Sequence[str]) -> None:
    """pass@k over k = 1 to 8, left: test questions, right: hand test."""
    ks = range(1, SAMPLES + 1)
    for ax, (questions, title) in zip(axes, {"test": "test questions", "hand": "hand test"}.items(), strict=True):
        lines = {"the start": [start(runs, questions, f"pass@{k}").mean() for k in ks]}
        lines |= {arm: [values(runs, arm, questions, f"pass@{k}").mean() for k in ks] for arm in arms}
        for name, line in lines.items():
            colour, style = LOOKS.get(name, (LIBRARY, ":"))
            ax.plot(ks, line, color=colour, linestyle=style, marker="o", markersize=3, label=name)
        ax.set(xlabel="k", ylabel="pass@k", title=title)
    axes[0].legend(fontsize=8)


def paid_at_start(runs: Sequence[dict]) -> dict[str, float]:
    """What each check pays the start on validation questions: arm -> mean reward."""
    (run,) = final(runs, "temperature")
    return run["rewards"] | {"grpo": run["rewards"]["right"]}


def cheated(runs: Sequence[dict]) -> pd.DataFrame:
    """At the end of each check's runs, minus the start, on validation questions: what it pays, and the share right."""
    before, found = paid_at_start(runs), {}
    for arm, check in CHECKS.items():
        ends = [run["checkpoints"][-1] for run in final(runs, arm)]
        for key in ("reward", "right"):
            values = [end[key] - before[arm if key == "reward" else "grpo"] for end in ends]
            found.setdefault(check, {})[key] = alignment.spread(values)
    return pd.DataFrame(found).T.rename(columns={"reward": "what it pays"})


def plot_cheated(axes: Sequence[Axes], runs: Sequence[dict]) -> None:
    """A picture a check: the reward that it pays and the share that is right, a line a seed, over steps."""
    for ax, (arm, check) in zip(axes, CHECKS.items(), strict=True):
        before = paid_at_start(runs)
        for i, run in enumerate(final(runs, arm)):
            steps = [0, *(point["step"] for point in run["checkpoints"])]
            for key, colour, name in (("reward", REJECTED, "what it pays"), ("right", POLICY, "right")):
                ys = [before[arm if key == "reward" else "grpo"], *(point[key] for point in run["checkpoints"])]
                ax.plot(steps, ys, color=colour, marker="o", markersize=3, label=name if i == 0 else None)
        ax.set(title=f"checks: {check}", xlabel="step", ylim=(0, 1))
    axes[0].legend(fontsize=8)
