"""The lists of experiments that go by position: by the ids of their questions, their means, their
paired differences.

`python tests/positions.py FOLDER` writes golden/positions.json from records in the order of their
ids, which lie in FOLDER as they lie in experiments.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scripts import ROOT, script

GOLDEN = Path(__file__).parent / "golden" / "positions.json"
reindex = script("tools/reindex.py")
KNOWN = json.loads((ROOT / "experiments/ids.json").read_text(encoding="utf-8"))


def lists_of(file: str, folder: Path) -> Iterator[tuple[str, str, list | str]]:
    """(place, name of its list of ids, values) of every list of a file with one value a question."""
    for record in reindex.read(folder / file):
        for place, of in KNOWN["records"][file].items():
            name = reindex.list_of(of, record)
            if name is None:
                continue
            for holder, key in reindex.places(record, place):
                if reindex.one_a_question(holder[key]):
                    yield place, name, holder[key]


def by_id(values: list | str, ids: list[str]) -> list:
    """The values in the order of the ids of their questions."""
    assert len(values) == len(ids), (len(values), len(ids))
    of = dict(zip(ids, values, strict=True))
    return [of[id_] for id_ in sorted(ids, key=reindex.by_file(ids))]


def figures(lists: list[tuple[str, str, list | str]]) -> dict[str, list[list[float]]]:
    """{place and list: [mean, mean difference to the first, mean squared difference] of each}."""
    found, firsts = {}, {}
    for place, name, values in lists:
        if any(isinstance(value, str) or value is None for value in values):
            continue
        here, values = f"{place}, {name}", np.array(values, dtype=np.float64)
        apart = values - firsts.setdefault(here, values)
        found.setdefault(here, []).append([values.mean(), apart.mean(), (apart**2).mean()])
    return found


def digest(lists: list[list]) -> str:
    return hashlib.sha256(json.dumps(lists).encode()).hexdigest()


def main(folder: Path) -> None:
    """From records whose lists go by id: what they are and what follows from them."""
    golden = {}
    for file in KNOWN["records"]:
        if lists := list(lists_of(file, folder)):
            plain = [list(values) for *_, values in lists]
            golden[file] = {"lists": len(lists), "by_id": digest(plain), "figures": figures(lists)}
    rows = ",\n".join(f"{json.dumps(file)}: {json.dumps(one)}" for file, one in golden.items())
    GOLDEN.write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
