"""data/coverage: every piece of the article is there and is met by cells that exist."""

import re
from collections import Counter

import pytest
import yaml

from ftlab.classroom.claims import load
from ftlab.paths import DATA
from notebooks import CELLS, NOTEBOOKS, ROOT

ENTRIES = yaml.safe_load((DATA / "coverage" / "coverage.yaml").read_text(encoding="utf-8"))
CLAIMS = {claim.id: claim for claim in load()}
EVIDENCE = re.compile(
    r"\d\d_\w+#[\w-]+|(data|experiments)/(\w[\w.-]*/)*\w[\w.-]*\.(jsonl?|md|yaml)"
)  # a cell, or a data file

ARTICLE = {  # counted in the article by hand
    "section": 8, "part": 39, "analogy": 3, "table": 2, "row": 8, "step": 9, "tip": 12, "mistake": 4, "note": 6,
    "question": 5, "faq": 2,
}  # fmt: skip


def faults(entry: dict) -> list[str]:
    """What is wrong with one entry: its keys, its kind, cells or claims that there are not."""
    keys = set(entry)
    if not {"id", "kind", "title", "cells"} <= keys <= {"id", "kind", "title", "cells", "claims"}:
        return [f"got the keys {sorted(keys)}"]
    found = [] if entry["kind"] in ARTICLE else [f"got the kind {entry['kind']!r}"]
    found += [] if entry["cells"] and entry["title"].strip() else ["no title or no cell"]
    named = [cell for cell in entry["cells"] if EVIDENCE.fullmatch(cell)]
    there = {cell for cell in named if cell in CELLS or (ROOT / cell).is_file()}
    found += [f"no cell {cell}" for cell in entry["cells"] if cell not in there]
    return found + [f"no claim {claim}" for claim in entry.get("claims", []) if claim not in CLAIMS]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["id"])
def test_an_entry_names_cells_and_claims_that_there_are(entry):
    assert faults(entry) == []
    assert len(entry["cells"]) == len(set(entry["cells"]))


def test_every_piece_of_the_article_stands_there_once():
    assert Counter(entry["kind"] for entry in ENTRIES) == ARTICLE
    for key in ("id", "title"):
        assert [what for what, times in Counter(entry[key] for entry in ENTRIES).items() if times > 1] == []


def test_readme_counts_the_same():
    readme = (DATA / "coverage" / "README.md").read_text(encoding="utf-8")
    counted = {}
    for kinds, numbers in re.findall(r"^\| (`[a-z`, ]+`) \| .* \| ([\d, ]+) \|$", readme, re.M):
        counted |= dict(zip(re.findall(r"[a-z]+", kinds), map(int, numbers.split(", ")), strict=True))
    assert counted == ARTICLE and f"{len(ENTRIES)} entries" in readme


def test_every_claim_has_its_place():
    placed = {claim for entry in ENTRIES for claim in entry.get("claims", [])}
    assert [claim for claim in CLAIMS if claim not in placed] == []


@pytest.mark.parametrize("id", CLAIMS)
def test_a_claim_is_met_where_its_evidence_is(id):
    """Ledger and coverage point at the same notebooks, in at least one of the claim's places."""
    evidence = {cell.partition("#")[0] for cell in CLAIMS[id].evidence}
    places = {cell.partition("#")[0] for entry in ENTRIES if id in entry.get("claims", []) for cell in entry["cells"]}
    assert evidence & places or not evidence


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["id"])
def test_what_is_explained_or_advised_is_run(entry):
    """One of its cells is code that shows something, but for what can only be said or cited."""
    cited = {"align-rlhf", "align-table", "align-rider", "align-note", "why-graduate"}
    cells = [CELLS[cell] for cell in entry["cells"] if cell in CELLS]
    runs = any(cell["cell_type"] == "code" and cell["outputs"] for cell in cells)
    assert runs != (entry["id"] in cited)


def test_every_notebook_meets_something():
    assert {cell.partition("#")[0] for entry in ENTRIES for cell in entry["cells"] if cell in CELLS} == set(NOTEBOOKS)


def test_a_broken_entry_is_noticed():
    good = ENTRIES[0]
    assert faults(good) == []
    assert faults({**good, "cells": ["02_lora_math#lora-999"]}) == ["no cell 02_lora_math#lora-999"]
    assert faults({**good, "cells": [*good["cells"], "experiments/ask/records.jsonl"]}) == []
    assert faults({**good, "cells": ["experiments/none.json"]}) == ["no cell experiments/none.json"]
    assert faults({**good, "claims": ["C999"]}) == ["no claim C999"]
    assert faults({**good, "kind": "poem"}) == ["got the kind 'poem'"]
    assert faults({**good, "cells": []}) == ["no title or no cell"]
    assert faults({**good, "page": 1}) == [f"got the keys {sorted([*good, 'page'])}"]
