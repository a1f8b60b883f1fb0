"""Colab's stand-in: which notebooks passed."""


def passed(record: dict, lab) -> list[int]:
    return [int(run["exit"] == 0) for run in record["notebooks"].values()]
