"""What somebody gets who draws five times: the mean, the choice by validation, the luck in it."""

import numpy as np

from ftlab.statistics import mean_squares

SETS = ("test", "hand")
SHORT, LONG = "short", "long"
FAMILIES = {
    "five, short": (SHORT,),
    "five, long": (LONG,),
    "ten": (SHORT, LONG),
}


def records(lines: list[dict]) -> list[dict]:
    """The prompts as arms of their own, and what follows from each seed's five draws.

    `tidy`: a record a seed of "mean of ..." and "chosen of ..." for each family of prompts, and
    "luck" with `luck`, `range` and `order`. `ask`: a record a draw, since one seed drew all.
    """
    found = [told(line, line["task"]) for line in lines if line["arm"] != "few-shot"]
    for task in ("tidy", "ask"):
        seeds = sorted({r["seed"] for r in lines if r["arm"] == "few-shot" and r["task"] == task})
        for seed in seeds:
            mine = [
                r for r in lines if (r["arm"], r["task"], r["seed"]) == ("few-shot", task, seed)
            ]
            found += of_seed(mine) if task == "tidy" else of_draws(mine)
    return found


def of_seed(prompts: list[dict]) -> list[dict]:
    """What one seed's prompts give; only what all of its prompts are there for."""
    head = {"task": "tidy", "seed": prompts[0]["seed"]}
    straight = [r for r in prompts if r["order"] == "drawn"]
    found = []
    for family, lengths in FAMILIES.items():
        mine = [r for r in straight if r["instruction"] in lengths]
        if len(mine) == 5 * len(lengths):
            found.append(head | {"arm": f"mean of {family}"} | mean(mine))
            found.append(head | {"arm": f"chosen of {family}"} | values(chosen(mine)))
    spread = head | {"arm": "luck", "luck": {}, "range": {}, "order": {}}
    for length in (SHORT, LONG):
        mine = [r for r in straight if r["instruction"] == length]
        if len(mine) == 5:
            spread["luck"][length] = {set_: luck(table(mine, set_)) for set_ in SETS}
            spread["range"][length] = {set_: span(table(mine, set_)) for set_ in SETS}
    turned = [r for r in prompts if r["order"] == "turned"]
    if turned:
        (first,) = (r for r in straight if (r["draw"], r["instruction"]) == (0, SHORT))
        spread["order"] = {set_: luck(table([first, *turned], set_)) for set_ in SETS}
    return [*found, spread]


def of_draws(prompts: list[dict]) -> list[dict]:
    """Of `ask`: each draw as a unit of its arm, and the one that validation chooses of all."""
    found = []
    for one in prompts:
        arm = {"arm": f"any draw, {one['instruction']}", "task": "ask", "seed": one["draw"]}
        found.append(told(arm | values(one), "ask"))
    if len(prompts) == 10:
        arm = {"arm": "chosen of ten", "task": "ask", "seed": prompts[0]["seed"]}
        found.append(told(arm | values(chosen(prompts)), "ask"))
    return found


def told(record: dict, task: str) -> dict:
    """The record; of `ask` with its two sets under `ask`, so that the tasks' metrics don't mix."""
    if task != "ask":
        return record
    left = {key: value for key, value in record.items() if key not in SETS}
    return left | {"ask": values(record)}


def chosen(prompts: list[dict]) -> dict:
    """The prompt with the highest mean on validation; of equals the first, short before long."""
    order = sorted(prompts, key=lambda r: ((SHORT, LONG).index(r["instruction"]), r["draw"]))
    return max(order, key=lambda r: np.mean(r["validation"]))


def mean(prompts: list[dict]) -> dict:
    """{set: each question's mean over the prompts}."""
    return {set_: table(prompts, set_).mean(0).tolist() for set_ in SETS}


def values(prompt: dict) -> dict:
    return {set_: prompt[set_] for set_ in SETS}


def table(prompts: list[dict], set_: str) -> np.ndarray:
    """(prompts, questions)."""
    return np.array([r[set_] for r in prompts])


def span(scores: np.ndarray) -> float:
    """Best minus worst mean of the prompts; scores (prompts, questions)."""
    means = scores.mean(1)
    return float(means.max() - means.min())


def luck(scores: np.ndarray) -> float:
    """The standard deviation of the prompts' true scores; scores (prompts, questions).

    The variance component of a two-way random effects model: with MS the mean squares of prompts
    and of the rest, and n questions,  sigma^2 = max(0, (MS_prompts - MS_rest) / n).
    """
    prompts, _, rest = mean_squares(scores)
    return float(np.sqrt(max(0.0, (prompts - rest) / scores.shape[1])))
