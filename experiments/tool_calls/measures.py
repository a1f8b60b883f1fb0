"""What takes more than a place in a record of tool_calls: shares over the questions that count."""

HAND = 77  # the questions of hand_test.jsonl come first, then those of test.jsonl


def repeats_test(record: dict, lab) -> float | None:
    return _repeats(record, slice(HAND, None))


def repeats_hand(record: dict, lab) -> float | None:
    return _repeats(record, slice(HAND))


def _repeats(record: dict, part: slice) -> float | None:
    """On the other table: of the observations with one value, how many the answer says."""
    if "repeats" not in record:
        return None
    counted = [value for value in record["repeats"]["9"][part] if value is not None]
    return sum(counted) / len(counted)
