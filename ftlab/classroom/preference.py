"""What notebook 06 shows of data/results/preference.jsonl: what thumbs are worth, and what noise and rare ups cost.

    runs, controls = alignment.records("preference"), alignment.records("alignment")
    table(runs, controls, "hand")       each arm against the start, beside a lower temperature and best of n
    against(runs, "hand")               each arm against the arms that are told less, or as much
    separation(runs, "hand")            DPO against KTO and SFT, as thumbs get worse

Differences are taken ticket by ticket, and between two arms seed by seed. Intervals are 95 % over seeds and tickets
(ftlab.classroom.seeds), with a star where they leave out 0.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ftlab.classroom import alignment, seeds
from ftlab.classroom.show import CHOSEN, POLICY, REFERENCE, REJECTED

ARMS = {  # name -> arm, how it was told
    "more sft": ("more sft", {}), "sft up": ("sft up", {}), "orpo": ("orpo", {}), "dpo": ("dpo", {}),
    "kto": ("kto", {}), "sft human": ("sft human", {}), "spin": ("spin", {}),
}  # fmt: skip
BASES = ("more sft", "sft up", "sft human")  # SFT with no thumb, with the same thumbs, with people's answers
COLOURS = {"dpo": REJECTED, "kto": POLICY, "sft up": CHOSEN}  # in the pictures of noise
TEMPERATURE, N = 0.2, 8  # the controls that train nothing
Golds = dict[int, list[float]]  # seed -> gold of each ticket ("test" or "hand")
CONDITIONS = {  # name -> what the thumbs of an arm were like
    "thumbs as given": {}, "20 % turned": {"noise": 0.2}, "40 % turned": {"noise": 0.4},
    "one up to ten downs": {"data": "few ups"},
}  # fmt: skip
KTO = {"kto": {}, "kto, unweighted": {"weighted": False}}


def golds(runs: Sequence[dict], arm: str, tickets: str, kind: str = "sampled", **what: object) -> Golds:
    """The final runs of an arm; kind is "sampled" or "greedy", `what` says how the arm was told (data, noise, ...)."""
    return {run["seed"]: run[tickets][kind] for run in _final(runs, arm, what)}


def minus(mine: Golds, theirs: Golds) -> tuple[float, float, float] | None:
    """Mean and interval of two arms' difference, over the seeds that both have; None where there is none."""
    if not (both := mine.keys() & theirs.keys()):
        return None
    return seeds.interval(np.array([np.subtract(mine[seed], theirs[seed]) for seed in sorted(both)]))


def start(controls: Sequence[dict], tickets: str, temperature: float) -> np.ndarray:
    """Gold of the start at a temperature of its samples, (seeds, tickets), from the runs of alignment.jsonl."""
    points = [point for run in alignment.final(controls, "temperature") for point in run["points"]]
    return np.array([point[tickets] for point in points if point["temperature"] == temperature])


def gain(mine: Golds, before: np.ndarray) -> tuple[float, float, float]:
    """Mean and interval of an arm's gold minus the start's, whose seeds are averaged."""
    return seeds.interval(np.array(list(mine.values())) - before.mean(0))


def table(runs: Sequence[dict], controls: Sequence[dict], tickets: str = "hand") -> pd.DataFrame:
    """Gold minus the start's, sampled and greedy; KL in nats (validation tickets), seconds of one core in plain TRL.

    The first rows are controls: their samples are held against the start's at temperature 1.
    """
    before = {"sampled": start(controls, tickets, 1.0), "greedy": start(controls, tickets, 0.0)}
    lower = start(controls, tickets, TEMPERATURE)
    best = [p[tickets] for run in alignment.final(controls, "best of n") for p in run["points"] if p["n"] == N]
    rows = {f"temperature {TEMPERATURE}": dict(enumerate(lower.tolist())), f"best of {N}": dict(enumerate(best))}
    found = {name: {"sampled": seeds.shown(gain(mine, before["sampled"]))} for name, mine in rows.items()}
    for name, (arm, how) in ARMS.items():
        if not (mine := _final(runs, arm, how)):
            continue
        found[name] = {k: seeds.shown(gain(golds(runs, arm, tickets, k, **how), before[k])) for k in before}
        found[name]["KL"] = f"{np.mean([run['checkpoints'][-1]['kl'] for run in mine]):.1f}"
        found[name] |= {"core s": f"{_seconds(runs, arm, mine):.0f}", "seeds": str(len(mine))}
    return pd.DataFrame(found).T.fillna("-")


def against(runs: Sequence[dict], tickets: str = "hand", kind: str = "sampled") -> pd.DataFrame:
    """Gold of each arm minus that of more sft, of sft up and of sft human."""
    mine = {name: golds(runs, arm, tickets, kind, **how) for name, (arm, how) in ARMS.items()}
    return pd.DataFrame({
        f"minus {base}": {name: _shown(minus(mine[name], mine[base])) for name in mine if name not in BASES}
        for base in BASES
    })  # fmt: skip


def separation(runs: Sequence[dict], tickets: str = "hand") -> pd.DataFrame:
    """Gold of DPO minus that of KTO, in each way that KTO was run, and minus that of sft up; a row a condition."""
    others = {**{name: ("kto", how) for name, how in KTO.items()}, "sft up": ("sft up", {})}
    return pd.DataFrame({
        f"dpo minus {name}": {
            title: _shown(minus(golds(runs, "dpo", tickets, **what), golds(runs, arm, tickets, **what, **how)))
            for title, what in CONDITIONS.items()
        }
        for name, (arm, how) in others.items()
    })  # fmt: skip


def plot_gains(ax: Axes, runs: Sequence[dict], controls: Sequence[dict], tickets: str = "hand") -> Axes:
    """Sampled gold of each arm minus the start's, with its interval; grey: SFT, blue: methods that compare."""
    found = {name: golds(runs, arm, tickets, **how) for name, (arm, how) in ARMS.items()}
    names = [name for name in found if found[name]][::-1]
    for place, name in enumerate(names):
        mean, low, high = gain(found[name], start(controls, tickets, 1.0))
        colour = REFERENCE if name in BASES else POLICY
        ax.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", capsize=3, color=colour)
    ax.axvline(0, color="black", linewidth=1)
    ax.set(yticks=range(len(names)), yticklabels=names, xlabel="gold of sampled replies, minus the start's")
    ax.grid(axis="x", color="#e6e6e6")
    return ax


def plot_separation(axes: Sequence[Axes], runs: Sequence[dict], controls: Sequence[dict], tickets: str) -> None:
    """Left: sampled gold over the share of turned thumbs. Right: at one up to ten downs. Dashed: the start."""
    left, right = axes
    for shift, (arm, colour) in zip((-0.004, 0, 0.004), COLOURS.items(), strict=True):
        found = {noise: golds(runs, arm, tickets, noise=noise) for noise in (0.0, 0.2, 0.4)}
        points = [(noise + shift, *_level(mine)) for noise, mine in found.items() if mine]
        if points:
            x, mean, low, high = np.array(points).T
            left.errorbar(x, mean, [mean - low, high - mean], fmt="o-", capsize=3, color=colour, label=arm)
    bars = {"dpo": ("dpo", {})} | {name: ("kto", how) for name, how in KTO.items()} | {"sft up": ("sft up", {})}
    found = {name: golds(runs, arm, tickets, data="few ups", **how) for name, (arm, how) in bars.items()}
    found = {name: _level(mine) for name, mine in found.items() if mine}
    for place, (name, (mean, low, high)) in enumerate(found.items()):
        right.barh(place, mean, color=COLOURS[bars[name][0]], height=0.62)
        right.plot([low, high], [place, place], color="black", linewidth=1.2)
    before = start(controls, tickets, 1.0).mean()
    left.axhline(before, color=REFERENCE, linestyle="--", linewidth=1)
    right.axvline(before, color=REFERENCE, linestyle="--", linewidth=1)
    left.set(xlabel="share of thumbs that are turned", ylabel="gold of sampled replies", xticks=[0, 0.2, 0.4])
    right.set(yticks=range(len(found)), yticklabels=found, xlabel="gold at one up to ten downs")
    right.invert_yaxis()
    left.legend(fontsize=8)


def _final(runs: Sequence[dict], arm: str, what: dict) -> list[dict]:
    """The final runs of an arm, by seed. KTO has its weight, unless `what` says otherwise."""
    keys = {"data": "all", "noise": 0.0, "weighted": arm == "kto"} | what
    mine = [run for run in runs if (run["arm"], run["phase"]) == (arm, "final")]
    return sorted((run for run in mine if all(run[k] == v for k, v in keys.items())), key=lambda run: run["seed"])


def _seconds(runs: Sequence[dict], arm: str, mine: Sequence[dict]) -> float:
    """Steps times the measured seconds of a step, and SPIN's sampling."""
    (timed,) = (run for run in runs if (run["arm"], run["phase"]) == (arm, "time"))
    return mine[0]["checkpoints"][-1]["step"] * timed["seconds_a_step"] + timed["seconds_of_sampling"]


def _level(mine: Golds) -> tuple[float, float, float]:
    return seeds.interval(np.array(list(mine.values())))


def _shown(three: tuple[float, float, float] | None) -> str:
    return seeds.shown(three) if three else "-"
