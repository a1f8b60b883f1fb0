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


def answers_itself(record: dict, lab) -> list[int] | None:
    """1 where the model, not stopped after its call, writes an answer that it can't know yet."""
    if "unstopped" not in record:
        return None
    return [int(_goes_on(text)) for text in record["unstopped"]]


def _goes_on(text: str) -> bool:
    rest = text.partition("</tool_call>")[2]
    return "There were " in rest or "It is " in rest
