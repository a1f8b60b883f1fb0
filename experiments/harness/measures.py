"""Harness: on which questions a program agrees with our own loop."""


def same_verdict(record: dict, lab) -> list[int]:
    return _agrees(record, lab, "right")


def same_answer(record: dict, lab) -> list[int]:
    return _agrees(record, lab, "answers")


def _agrees(record: dict, lab, field: str) -> list[int]:
    [ours] = [one for one in lab.records if one["who"] == "our loop"]
    return [int(a == b) for a, b in zip(record[field], ours[field], strict=True)]
