"""How often do the intervals of ftlab.statistics find a difference that is not there?

    python bench/verdicts.py           about 5 minutes of processor time

Two arms are simulated that are equally good by construction, 10,000 times a cell, and compared as
`compare` does. A score comes from a latent value: how easy the question is (standard deviation 2),
and for each arm noise (1) and, where the cell has them, an effect of the seed (0.4: seeds then
differ by some 7 points, as the course's own runs do) and an effect of the question on this arm, the
same for all seeds (1). Three kinds of scores come out of it:

0/1          right where the latent value is above 0: about one half of the answers
0/1, easy    right where it is above -4: about 95 %, so most questions tell nothing
tenths       its logistic function, rounded to tenths: a share of words right, say

No verdict knows the components. Three tables: seeds crossed with questions (`crossed_interval`),
one run an arm (`gap_interval`: McNemar's exact test or sign flips), and one arm alone
(`score_interval`: how often its interval misses the true mean). "Skewed" are differences whose mean
is 0 but whose signs cannot be swapped: nine in ten lose 0.05 or less, the tenth wins 0.45 or less;
so the sign flips promise nothing about them.

False differences are counted whatever the verdict would add: below six seeds or questions `compare`
says "too few".
"""

import functools
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import harness
import numpy as np

from ftlab import statistics

DRAWS, AT_ONCE = 10_000, 250
KINDS = ("0/1", "0/1, easy", "tenths")
EFFECTS = {  # standard deviations of the effects of seeds and of questions
    "neither": (0.0, 0.0),
    "seeds": (0.4, 0.0),
    "questions": (0.0, 1.0),
    "both": (0.4, 1.0),
}
SEEDS, QUESTIONS = (2, 3, 4, 5, 6, 8, 12), (30, 100, 300, 1000)
FEW_QUESTIONS = (3, 6, 10)
MOST = 0.065  # what is wanted from six seeds and 100 questions on


def scores(
    rng: np.random.Generator, kind: str, effects: str, draws: int, seeds: int, questions: int
) -> tuple[np.ndarray, np.ndarray]:
    """Two equally good arms, each (draws, seeds, questions)."""
    of_seed, of_question = EFFECTS[effects]
    easy = 2 * rng.standard_normal((draws, 1, questions), np.float32)
    arms = []
    for _ in range(2):
        latent = easy + rng.standard_normal((draws, seeds, questions), np.float32)
        latent += of_seed * rng.standard_normal((draws, seeds, 1), np.float32)
        latent += of_question * rng.standard_normal((draws, 1, questions), np.float32)
        arms.append(judged(latent, kind))
    return arms[0], arms[1]


def judged(latent: np.ndarray, kind: str) -> np.ndarray:
    if kind == "tenths":
        return np.round(10 / (1 + np.exp(-latent.astype(float)))) / 10
    return (latent > (-4 if kind == "0/1, easy" else 0)).astype(float)


def skewed(rng: np.random.Generator, draws: int, questions: int) -> np.ndarray:
    """Differences (draws, questions) of mean 0: 0.45 u in one case of ten, else -0.05 u."""
    wins = rng.random((draws, questions)) < 0.1
    return np.where(wins, 0.45, -0.05) * rng.random((draws, questions))


def share(found: Callable[[int], np.ndarray]) -> float:
    """The share of DRAWS for which found(AT_ONCE), called so often, is True."""
    return float(np.concatenate([found(AT_ONCE) for _ in range(DRAWS // AT_ONCE)]).mean())


def crossed() -> Iterator[dict]:
    for number, cell in enumerate(product(KINDS, EFFECTS, SEEDS, QUESTIONS)):
        kind, effects, seeds, questions = cell
        rng = np.random.default_rng([1, number])

        def found(draws: int) -> np.ndarray:
            one, other = scores(rng, kind, effects, draws, seeds, questions)  # noqa: B023
            _, low, high = statistics.crossed_interval(one - other)
            return (low > 0) | (high < 0)

        names = {"scores": kind, "effects": effects, "seeds": seeds, "questions": questions}
        yield {**names, "false": share(found)}


@functools.cache
def decided(better: int, worse: int, questions: int) -> bool:
    low, high = statistics.agresti_min_interval(better, worse, questions)
    return low > 0 or high < 0


def one_run() -> Iterator[dict]:
    kinds, sizes = (*KINDS, "skewed"), (*FEW_QUESTIONS, *QUESTIONS)
    for number, (kind, questions) in enumerate(product(kinds, sizes)):
        rng = np.random.default_rng([2, number])

        def found(draws: int) -> np.ndarray:
            if kind == "skewed":  # noqa: B023
                gaps = skewed(rng, draws, questions)  # noqa: B023
            else:
                one, other = scores(rng, kind, "questions", draws, 1, questions)  # noqa: B023
                gaps = (one - other)[:, 0]
            if kind.startswith("0/1"):  # noqa: B023
                counts = zip((gaps > 0).sum(1), (gaps < 0).sum(1), strict=True)
                n = questions  # noqa: B023
                return np.array([decided(int(up), int(down), n) for up, down in counts])
            low, high = statistics.sign_flip_interval(gaps.T)
            return (low > 0) | (high < 0)

        yield {"scores": kind, "questions": questions, "false": share(found)}


def one_arm() -> Iterator[dict]:
    for number, (kind, questions) in enumerate(product(KINDS, (*FEW_QUESTIONS, *QUESTIONS))):
        rng = np.random.default_rng([3, number])
        truth = scores(rng, kind, "neither", 1, 1, 4_000_000)[0].mean()

        def found(draws: int) -> np.ndarray:
            values = scores(rng, kind, "neither", draws, 1, questions)[0][:, 0]  # noqa: B023
            ends = [statistics.score_interval(each) for each in values]
            return np.array([not low <= truth <= high for low, high in ends])  # noqa: B023

        yield {"scores": kind, "questions": questions, "missed": share(found)}


def table(cells: list[dict], down: tuple[str, ...], across: str, value: str) -> list[str]:
    """Lines of Markdown, in percent: a row for each combination of `down`, columns for `across`."""
    columns = list(dict.fromkeys(cell[across] for cell in cells))
    lines = [
        f"| {' | '.join(down)} | " + " | ".join(f"{across}: {column}" for column in columns) + " |",
        "|---" * (len(down) + len(columns)) + "|",
    ]
    for row in dict.fromkeys(tuple(cell[name] for name in down) for cell in cells):
        same = [cell for cell in cells if tuple(cell[name] for name in down) == row]
        mine = {cell[across]: f"{100 * cell[value]:.1f}" for cell in same}
        entries = [*map(str, row), *(mine[column] for column in columns)]
        lines.append(f"| {' | '.join(entries)} |")
    return lines


def enough(cell: dict) -> bool:
    """Whether `compare` makes a claim in this cell, and 6.5 % at most are wanted."""
    return cell["seeds"] >= statistics.FEW and cell["questions"] >= 100


def page(result: dict) -> str:
    """The three tables, as they stand in bench/results/verdicts.md."""
    worst = result["worst"]
    few = [cell for cell in result["crossed"] if not enough(cell)]
    other = max(few, key=lambda cell: cell["false"])
    lines = [
        "# How often a difference is found where there is none",
        "",
        f"Percent of {result['draws']:,} simulated comparisons of equally good arms.",
        "`bench/verdicts.py` makes them and says how. 5.0 is promised; the standard error of an",
        "entry near 5 is 0.2. With six or more seeds and 100 or more questions, the worst of",
        f"{worst['cells']} cells has {100 * worst['false']:.1f} %. Of the other cells the worst has",
        f"{100 * other['false']:.1f} % ({other['seeds']} seeds, {other['questions']} questions);",
        "below six seeds `compare` says “too few”.",
        "",
        "The sign flips of one run fail on skewed differences of few questions, as any test would",
        "that knows no more than these: six small losses in a row look like a loss.",
        "",
    ]
    for kind in dict.fromkeys(cell["scores"] for cell in result["crossed"]):
        mine = [cell for cell in result["crossed"] if cell["scores"] == kind]
        lines += [f"## Seeds crossed with questions: {kind}", ""]
        lines += [*table(mine, ("seeds", "questions"), "effects", "false"), ""]
    lines += [
        "## One run an arm",
        "",
        *table(result["one_run"], ("questions",), "scores", "false"),
        "",
    ]
    lines += ["## One arm alone: its interval misses the true mean", ""]
    lines += [*table(result["one_arm"], ("questions",), "scores", "missed"), ""]
    return "\n".join(lines)


def main() -> None:
    result: dict = {"draws": DRAWS}
    with harness.stopwatch() as taken:
        for part in (one_run, one_arm, crossed):
            result[part.__name__] = []
            for cell in part():
                result[part.__name__].append(cell)
                print(cell, flush=True)
    many = [cell for cell in result["crossed"] if enough(cell)]
    over = [cell for cell in many if cell["false"] > MOST]
    result["worst"] = {
        **max(many, key=lambda cell: cell["false"]),
        "cells": len(many),
        "over": len(over),
    }
    file = harness.write("verdicts", {**taken, **result})
    Path(file).with_suffix(".md").write_text(page(result), encoding="utf-8")
    print(page(result))


if __name__ == "__main__":
    main()
