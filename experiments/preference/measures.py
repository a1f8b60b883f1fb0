"""Beside the runs: the SFT model that they begin from, untrained, from experiments/alignment."""

from experiments import lab
from experiments.alignment import measures
from ftlab.paths import EXPERIMENTS


def records(lines: list[dict]) -> list[dict]:
    """The runs, with the seconds that plain TRL takes for so many steps, and the SFT model."""
    plain = {line["arm"]: line for line in lines if line["phase"] == "time"}
    found = [line | _seconds(line, plain) for line in lines]
    others = lab.read_records(EXPERIMENTS / "alignment" / "records.jsonl")
    return [*found, *measures.untrained(others)]


def _seconds(line: dict, plain: dict[str, dict]) -> dict:
    if line["phase"] != "final":
        return {}
    timed, steps = plain[line["arm"]], line["checkpoints"][-1]["step"]
    return {"plain_seconds": steps * timed["seconds_a_step"] + timed["seconds_of_sampling"]}
