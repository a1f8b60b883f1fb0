"""What the statements of gate read: each resample's verdict as a zero or a one.

The file has them as bits in hexadecimal. The arm `announced` is made of the chance that the gate
printed at each resample of `equal`: it's held against what that resample came to.
"""


def records(lines: list[dict]) -> list[dict]:
    """A record an arm: {line: {set: {case: a list of zeros and ones, or of chances}}}."""
    found = []
    for line in lines:
        about = {key: line[key] for key in line if key not in ("passed", "announced")}
        bits = {name: _each(sets, _bits, line) for name, sets in line["passed"].items()}
        found.append(about | bits | {"seed": 0})
        if "announced" in line:
            told = _each(line["announced"], _percents, line)
            found.append(about | {"candidate": "announced", "quality": told, "seed": 0})
    return found


def _each(sets: dict, read, line: dict) -> dict:
    return {
        set_: {case: read(text)[: line["resamples"]] for case, text in cases.items()} for set_, cases in sets.items()
    }


def _bits(text: str) -> list[int]:
    return [byte >> place & 1 for byte in bytes.fromhex(text) for place in range(7, -1, -1)]


def _percents(text: str) -> list[float]:
    return [byte / 100 for byte in bytes.fromhex(text)]
