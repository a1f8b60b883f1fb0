"""Files that hold a list of entries with ids, in YAML: quizzes, cards, claims."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftlab.reading import read_yaml


def read(path: Path, make: Callable[[object, str], Any], name: str, error: type[ValueError]) -> list:
    """What `make(entry, where)` gives for each entry of the file; where says which one it is, for messages.

    name: of one entry, "question" or "card". Raises `error` if the file is no YAML, holds no list, or has an id twice.
    """
    entries = read_yaml(path, error)
    if not isinstance(entries, list):
        raise error(f"{path.name}: got {type(entries).__name__}, wanted a list of {name}s")
    made = [make(entry, f"{path.name}, {name} {i + 1}") for i, entry in enumerate(entries)]
    check_ids(made, path.name, error)
    return made


def check_ids(made: list, file: str, error: type[ValueError]) -> None:
    """Raises `error` if two of these have the same `id`."""
    ids = [one.id for one in made]
    if twins := {id for id in ids if ids.count(id) > 1}:
        raise error(f"{file}: the id {min(twins)!r} stands twice")
