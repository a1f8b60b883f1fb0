"""The letters of errors.py as a 0 or 1 a question: `kind.m.test` is where a condition lacks."""

from experiments.rehearsal.errors import LETTERS


def records(lines: list[dict]) -> list[dict]:
    """The records; those with `kinds` have `kind` too: {letter: {set: a 0 or 1 a question}}."""
    return [line | {"kind": of(line["kinds"])} if "kinds" in line else line for line in lines]


def of(kinds: dict[str, str]) -> dict[str, dict[str, list[int]]]:
    """{letter: {set: 1 where a question has this letter}}."""
    found = {}
    for letter in LETTERS:
        found[letter] = {set_: [int(one == letter) for one in told] for set_, told in kinds.items()}
    return found
