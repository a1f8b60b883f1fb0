"""What notebook 01 shows of data/results/methods.jsonl: seven methods on four tasks, on the same examples.

    runs = records()
    plot_matrix(axes, runs)          task by method: the mean and its interval, a panel a task
    winners(runs)                    the family that won each task, and by how much
    compare(runs, "tidy", "fine-tuning", "rules")      one method minus another, example by example
    plot_sizes, noise_table, plot_known, domain_table  what the rows decide

A trained arm has three seeds. Intervals are 95 % over seeds and examples (ftlab.classroom.seeds).
"""

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ftlab.classroom import seeds
from ftlab.classroom.show import CHOSEN, POLICY, REFERENCE, REJECTED
from ftlab.paths import DATA

TASKS = {
    "facts": "facts of a handbook",
    "ask": "question to SQL",
    "tidy": "hasty note to clean sentence",
    "triage": "ticket to JSON",
}
FAMILIES = {
    "zero-shot": "prompting",
    "few-shot": "prompting",
    "constrained": "prompting",
    "retrieval": "retrieval",
    "rules": "rules",
    "fine-tuning": "fine-tuning",
    "fine-tuning + retrieval": "fine-tuning",
}
ARMS = tuple(FAMILIES)
RULES = {"facts": "search alone", "ask": "parser", "tidy": "spelling library", "triage": "n-gram regression"}
KINDS = {"rules": REFERENCE, "fine-tuning": POLICY, "fine-tuning + retrieval": POLICY}  # the others ask the base model


def records() -> list[dict]:
    """The runs of data/results/methods.jsonl."""
    lines = (DATA / "results" / "methods.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def untouched() -> float:
    """The share of words right if a note of `tidy` is left as it is (data/tidy/controls.json)."""
    controls = json.loads((DATA / "tidy" / "controls.json").read_text(encoding="utf-8"))
    return controls["untouched"]["hand_test"]["words_right"]["mean"]


def values(runs: Sequence[dict], task: str, arm: str) -> np.ndarray:
    """(seeds, examples): what each answer is worth; no seeds where the arm does not exist for the task."""
    mine = sorted((run for run in runs if (run["task"], run["arm"]) == (task, arm)), key=lambda run: run["seed"])
    return np.array([run["values"] for run in mine])


def arms(runs: Sequence[dict], task: str) -> list[str]:
    """The arms that a task has, the best first."""
    found = {arm: values(runs, task, arm) for arm in ARMS}
    return sorted((arm for arm in found if found[arm].size), key=lambda arm: -found[arm].mean())


def compare(runs: Sequence[dict], task: str, arm: str, other: str) -> tuple[float, float, float]:
    """(mean, low, high) of arm minus other on the same examples; an arm that is not trained counts for each seed."""
    mine, theirs = values(runs, task, arm), values(runs, task, other)
    if len(mine) > 1 and len(theirs) > 1 and len(mine) != len(theirs):
        raise ValueError(f"{task}: got {len(mine)} seeds of {arm} and {len(theirs)} of {other}, wanted as many")
    return seeds.interval(mine - theirs)


def family(task: str, arm: str) -> str:
    """Prompting, retrieval, rules or fine-tuning; on facts, all that answers from the pages it found is retrieval."""
    searches = task == "facts" and arm in ("rules", "fine-tuning + retrieval")
    return "retrieval" if searches else FAMILIES[arm]


def winners(runs: Sequence[dict]) -> pd.DataFrame:
    """A row a task: the family of the best arm, and what this arm has over the best one of the *other* families.

    The interval does not count that both arms were chosen on these examples.
    """
    rows = {}
    for task in TASKS:
        best, *others = arms(runs, task)
        won = family(task, best)
        other = next(arm for arm in others if family(task, arm) != won)
        mean, its_mean = (values(runs, task, arm).mean() for arm in (best, other))
        rows[task] = [won, best, mean, other, its_mean, seeds.shown(compare(runs, task, best, other))]
    columns = ["won by", "best", "mean", "best outside the family", "its mean", "best minus that"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def plot_matrix(axes: Sequence[Axes], runs: Sequence[dict]) -> None:
    """A panel a task, a bar a method with its interval; the best one is green, training blue, rules grey."""
    for ax, (task, title) in zip(axes, TASKS.items(), strict=True):
        best = arms(runs, task)[0]
        for y, arm in enumerate(ARMS):
            if not (found := values(runs, task, arm)).size:
                ax.text(0.01, -y, "-", va="center", color=REFERENCE)
                continue
            mean, low, high = seeds.interval(found)
            colour = CHOSEN if arm == best else KINDS.get(arm, "#E69F00")
            ax.barh(-y, mean, color=colour, height=0.66)
            ax.plot([low, high], [-y, -y], color="black", linewidth=1.2)
            note = f" ({RULES[task]})" if arm == "rules" else ""
            ax.text(max(high, mean) + 0.02, -y, f"{mean:.2f}{note}", va="center", fontsize=8)
        if task == "tidy":
            ax.axvline(untouched(), color="black", linestyle=":", linewidth=1)
            ax.text(untouched() + 0.02, -2, "left as it is", va="center", fontsize=8)
        ax.set(title=title, xlim=(0, 1.45), xticks=[0, 0.5, 1], yticks=range(0, -len(ARMS), -1), yticklabels=ARMS)
        ax.grid(axis="x", color="#e6e6e6")
        ax.grid(visible=False, axis="y")


def plot_sizes(ax: Axes, runs: Sequence[dict]) -> Axes:
    """`tidy`: words right over n labelled rows, which are trained on or stand in the prompt."""
    labelled = len((DATA / "tidy" / "train.jsonl").read_text(encoding="utf-8").splitlines())
    prompted = {8: ("tidy", "few-shot"), labelled: ("tidy", "retrieval")}
    tuned = ("tidy", "fine-tuning")
    trained = {run["rows"]: tuned for run in runs if (run["task"], run["arm"]) == tuned}
    for run in (run for run in runs if run["task"] == "size"):
        way, n = run["arm"].split()[0], int(run["arm"].split()[-1])
        (trained if way == "trained" else prompted)[n] = ("size", run["arm"])
    for label, found, colour in (("trained on", trained, POLICY), ("in the prompt", prompted, "#E69F00")):
        ns = sorted(found)
        mean, low, high = np.array([seeds.interval(values(runs, *found[n])) for n in ns]).T
        ax.errorbar(ns, mean, [mean - low, high - mean], fmt="o-", color=colour, capsize=3, label=label)
    ax.axhline(values(runs, "tidy", "rules").mean(), color=REFERENCE, linestyle="--", linewidth=1, label="rules")
    ax.axhline(untouched(), color="black", linestyle=":", linewidth=1, label="left as it is")
    ax.set(xscale="log", xticks=(ns := sorted(trained | prompted)), xticklabels=[f"{n:,}" for n in ns])
    ax.set(xlabel="labelled rows", ylabel="share of words right", ylim=(0, 1))
    ax.minorticks_off()
    ax.legend(fontsize=8, loc="lower right")
    return ax


def noise_table(runs: Sequence[dict]) -> pd.DataFrame:
    """`tidy`, a row an arm: the share of words right, and the gain over 128 right rows, with its interval."""
    arms = {
        "128 right rows, once": ("noise", "the right half alone"),
        "the same and 128 wrong ones, once": ("noise", "256, half wrong"),
        "128 right rows, twice": ("size", "trained on 128"),
        "32 right rows, four times": ("size", "trained on 32"),
    }
    found = {name: values(runs, *arm) for name, arm in arms.items()}
    clean = next(iter(found.values()))
    gaps = {name: seeds.shown(seeds.interval(mine - clean)) for name, mine in found.items() if mine is not clean}
    right = {name: f"{mine.mean():.3f}" for name, mine in found.items()}
    return pd.DataFrame({"words right": right, "minus the first": gaps}, index=found).fillna("")


def plot_known(axes: Sequence[Axes], runs: Sequence[dict]) -> None:
    """Left: the share of the taught questions answered, right: of the others; a line a seed, over passes."""
    for arm, colour in (("known", CHOSEN), ("unknown", REJECTED)):
        for i, run in enumerate(run for run in runs if (run["task"], run["arm"]) == ("known", arm)):
            passes = [point["passes"] for point in run["curve"]]
            for ax, key in zip(axes, ("taught", "others"), strict=True):
                label = f"taught {arm} facts" if i == 0 else None
                ax.plot(passes, [point[key] for point in run["curve"]], "o-", color=colour, label=label, alpha=0.7)
    before = np.mean([run["before"] for run in runs if run["task"] == "known"])
    axes[1].axhline(before, color=REFERENCE, linestyle="--", linewidth=1, label="before training")
    for ax, title in zip(axes, (f"the {run['rows']} taught questions", "other questions"), strict=True):
        ax.set(title=title, xlabel="passes", ylim=(0, 1.02), xticks=passes)
    axes[0].set(ylabel="share answered right")
    axes[0].legend(fontsize=8, loc="lower right"), axes[1].legend(fontsize=8, loc="upper right")


def domain_table(runs: Sequence[dict]) -> pd.DataFrame:
    """Perplexity before and after plain text of the handbook, the mean of the seeds, with its ratio."""
    mine = [run for run in runs if run["task"] == "domain"]
    found = {
        where: {when: np.mean([run[when][where] for run in mine]) for when in ("before", "after")}
        for where in mine[0]["before"]
    }
    table = pd.DataFrame(found).T.assign(ratio=lambda table: table["after"] / table["before"])
    return table.add_prefix("perplexity ").rename(columns={"perplexity ratio": "after / before"}).round(2)
