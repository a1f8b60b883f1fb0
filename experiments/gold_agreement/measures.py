"""The records hold verdicts by the id of a reply; the metrics want lists, all in one order."""


def records(lines: list[dict]) -> list[dict]:
    found = []
    for line in lines:
        same = {name: _values(by_id) for name, by_id in line["same"].items()}
        found.append(line | {"same": same})
    return found


def _values(by_id: dict[str, int]) -> list[int]:
    return [by_id[id] for id in sorted(by_id)]
