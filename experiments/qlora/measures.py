"""What the statements of qlora read beside its records: notebook 05's LoRA runs, its baseline.

They are the arm "live" of experiments/ask: the same recipe, rows and seeds on the weights as they
came, which were not rounded to NF4.
"""

from experiments.runs import read
from ftlab.paths import EXPERIMENTS


def records(lines: list[dict]) -> list[dict]:
    """The runs of this experiment, and those of LoRA on the same rows with the same seeds."""
    seeds = {line["seed"] for line in lines}
    asked = read(EXPERIMENTS / "ask" / "records.jsonl")
    return [*lines, *(one for one in asked if one["arm"] == "live" and one["seed"] in seeds)]
