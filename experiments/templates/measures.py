"""Templates: what became of each of the 132 answers, from the letters that a record holds."""


def right(record: dict, lab) -> list[int]:
    return _share(record, "r")


def runs(record: dict, lab) -> list[int]:
    """Right, or wrong and a query that runs."""
    return _share(record, "rw")


def fragment(record: dict, lab) -> list[int]:
    return _share(record, "t")


def empty(record: dict, lab) -> list[int]:
    return _share(record, "e")


def endless(record: dict, lab) -> list[int]:
    return _share(record, "n")


def same(record: dict, lab) -> list[int]:
    """1 where the answer is that of the own template, letter for letter."""
    [own] = [one for one in lab.records if one["way"] == "own"]
    return [int(a == b) for a, b in zip(record["answers"], own["answers"], strict=True)]


def _share(record: dict, kinds: str) -> list[int]:
    return [int(kind in kinds) for kind in record["kinds"]]
