"""What the statements of memory_error read: one record a rule, a value for each training step.

The file has a line for each step, with what every rule said of it.
"""

PARTS = {"known row": "known", "drawn row": "drawn"}
RULES = ("accelerate", "llama_factory", "eleuther")


def records(lines: list[dict]) -> list[dict]:
    """{"rule", "error": {set: percent off}, "within": {set: zeros and ones}}, ours first.

    A rule that does not cover a step has no value for it.
    """
    rows = [line for line in lines if line["part"] in PARTS]
    ours = [(PARTS[row["part"]], row["ratio"]) for row in rows]
    found = [_record("ours", ours, rows)]
    for rule in RULES:
        ratios = [(PARTS[row["part"]], row["others"][rule]) for row in rows]
        found.append(_record(rule, ratios, rows))
    return found


def _record(rule: str, ratios: list[tuple[str, float | None]], rows: list[dict]) -> dict:
    record = {"rule": rule, "seed": 0, "versions": rows[0]["versions"], "error": {}, "within": {}}
    for set_ in PARTS.values():
        off = [100 * abs(ratio - 1) for part, ratio in ratios if part == set_ and ratio is not None]
        if off:
            record["error"][set_] = off
            record["within"][set_] = [int(one <= 5) for one in off]
    return record
