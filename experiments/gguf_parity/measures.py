"""GGUF: a count of tickets as zeros and ones; which tickets is not recorded."""


def same(record: dict, lab) -> list[int]:
    """For the interval of a level alone: the tickets of two steps can't be paired."""
    count = record["same_answers"]
    return [1] * count + [0] * (record["tickets"] - count)
