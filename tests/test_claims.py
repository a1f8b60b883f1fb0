"""data/claims: every claim once, every cell there, nothing false said as true.

Each rule is a function from a text to its faults; the last section shows that each can find one.
"""

import functools
import re
from types import SimpleNamespace

import ipywidgets
import pytest
import yaml
from shown import VIEW, Page, named, page_of

from ftlab.classroom import claims
from ftlab.classroom.claims import VERDICTS, load
from notebooks import CELLS, ROOT

IDS = [*(f"C{n:02d}" for n in range(1, 104)), *(f"X{n}" for n in range(1, 10))]
CLAIMS = {claim.id: claim for claim in load()}
MARKDOWN = {name: "".join(cell["source"]) for name, cell in CELLS.items() if cell["cell_type"] == "markdown"}
PROSE = MARKDOWN | {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}

# --- The ledger -------------------------------------------------------------------------------------------------------


def test_every_claim_stands_there_once_and_in_order():
    assert [claim.id for claim in load()] == IDS


def cells_of(claim) -> list[dict]:
    """The cells of its evidence; KeyError with the name of a cell or data file if there is none."""
    files = {cell for cell in claim.evidence if "#" not in cell}
    if missing := [file for file in files if not (ROOT / file).is_file()]:
        raise KeyError(missing[0])
    return [CELLS[cell] for cell in claim.evidence if cell not in files]


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=lambda claim: claim.id)
def test_its_evidence_is_there_and_of_the_kind_that_it_names(claim):
    """What is computed or measured is so in a code cell that shows something, or in a lab report that the records give;
    else it is cited or said to be open.
    """
    shows = [cell for cell in cells_of(claim) if cell["cell_type"] == "code" and cell["outputs"]]
    shows += [file for file in claim.evidence if re.fullmatch(r"experiments/\w+/report\.md", file)]
    if re.search(r"\b(computed|measured|counted)\b", claim.source):
        assert shows
    else:
        assert re.search(
            r"arXiv:\d{4}\.\d{5}|no source found|README|wiki|blog|page|terms|packages|TRL \d|PEFT \d", claim.source
        )


def test_an_entry_refers_only_to_claims_that_there_are():
    named = {id for claim in load() for id in re.findall(r"\b[CX]\d+\b", claim.correct)}
    assert named and named <= set(IDS)


# --- The notebooks ----------------------------------------------------------------------------------------------------


def test_prose_names_no_claim_by_its_number():
    """They belong to the last notebook, which shows the ledger. A notebook says what it measured."""
    named = {name for name, text in MARKDOWN.items() if re.search(r"\b(C\d\d|C10\d|X[1-9])\b", text)}
    assert {name for name in named if not name.startswith("11_")} == set()
    assert named, "so it would be seen"


# --- Nothing false said as true ---------------------------------------------------------------------------------------


def sentences(markdown: str) -> list[str]:
    """Sentences, headings, list items and rows of tables, without HTML tags and marks of emphasis."""
    text = re.sub(r"</?[a-z][^>]*>", "\n", markdown.replace("**", "").replace("*", ""))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [part for line in lines for part in ([line] if line.startswith("|") else re.split(r"(?<=[.!?])\s+", line))]


@functools.cache
def own_words(markdown: str) -> dict[str, str]:
    """The sentences that are the course's own word, and each without what stands in quotes.

    Not: a question; a sentence or row that names a claim, the article or somebody who says so.
    """
    another = re.compile(r"\b[CX]\d+\b|\barticle\b|\bsomebody (says|tells)\b|\?$")
    own = [one for one in sentences(markdown.replace("“", '"').replace("”", '"')) if not another.search(one)]
    return {sentence: re.sub(r'"[^"]*"', '""', sentence) for sentence in own}


def stated(claim, markdown: str) -> list[str]:
    """The sentences that state what is false, as the course's own word."""
    said = own_words(markdown).items()
    return [one for one, bare in said if any(re.search(each["pattern"], bare, re.I) for each in claim.never)]


GUARDED = [claim for claim in load() if claim.never]


def test_what_is_wrong_or_dated_is_guarded():
    assert [claim.id for claim in load() if claim.verdict in ("WRONG", "DATED") and not claim.never] == []


@pytest.mark.parametrize("claim", GUARDED, ids=lambda claim: claim.id)
def test_no_notebook_states_it_as_true(claim):
    assert {cell: found for cell, text in PROSE.items() if (found := stated(claim, text))} == {}


@pytest.mark.parametrize("claim", GUARDED, ids=lambda claim: claim.id)
def test_a_false_statement_would_be_found(claim):
    """Each pattern finds its example in a paragraph; and lets what is true pass, or somebody else's word."""
    for one in claim.never:
        alone, sentence = SimpleNamespace(never=[one]), one["example"]
        assert stated(alone, f"A word before. {sentence} A word after.") == [sentence]
        assert stated(alone, f"| a row | {sentence} |")
        for excused in (f'It says "{sentence}"', f"The article says: {sentence}", f"| {claim.id} | {sentence} | no |"):
            assert stated(alone, excused) == []
        assert not re.search(one["pattern"], claim.correct, re.IGNORECASE)


# --- ftlab.classroom.claims -------------------------------------------------------------------------------------------


def listed(html: str) -> list[str]:
    """The claims of a page, in their order."""
    return re.findall(r"<b>([CX]\d+)</b> The article", html)


@pytest.fixture(scope="module")
def ledger():
    return claims.ledger()


def test_the_ledger_lists_what_has_all_words(ledger):
    field = named(ledger, ipywidgets.Text)["search"]

    def ids(words: str) -> set[str]:
        field.value = words
        found = listed(page_of(ledger))
        assert f"{len(found)} of {len(IDS)} claims" in Page(page_of(ledger)).open
        return set(found)

    assert {"C67", "C68", "C94", "C97", "C99"} <= ids("DATED") < set(IDS)
    memory = ids("WRONG MEMORY frozen")
    assert "C27" in memory and "C20" not in memory
    for word in ("c20", "two to five", "0.674", "biderman", "c20 0.674"):  # id, claim, correct, source, two of them
        assert "C20" in ids(word)
    assert ids("0.674 no-such-word") == set()
    assert ids("06_orpo_kto_spin") >= {claim.id for claim in load() if "06_orpo_kto_spin#" in str(claim.evidence)}
    assert ids("") == set(IDS) and 'tabindex="0"' in page_of(ledger) and 'role="status"' in page_of(ledger)


def test_without_a_kernel_every_claim_is_there_with_links_to_its_cells(ledger):
    bundle = ledger._repr_mimebundle_()
    page = Page(bundle["text/html"])
    assert VIEW in bundle and sorted(listed(bundle["text/html"])) == sorted(IDS)
    for cell in {cell for claim in load() for cell in claim.evidence}:
        name, _, id = cell.partition("#")
        assert (f"{name}.ipynb#cell-id={id}" if id else f"../{name}") in page.links
    assert all(verdict in page.open for verdict in VERDICTS)


def test_text_of_a_claim_is_escaped(monkeypatch):
    evil = "<script>1</script> `p < q` & b"
    one = SimpleNamespace(
        id="C01", verdict="WRONG", evidence=["02_lora_math#count"], claim=evil, correct=evil, source=evil
    )
    monkeypatch.setattr(claims, "load", lambda: [one])
    page = Page(claims.ledger().shown)
    assert page.text.count(evil.replace("`", "")) == 3 and page.links == ["02_lora_math.ipynb#cell-id=count"]


# --- The schema -------------------------------------------------------------------------------------------------------

EVIDENCE = re.compile(r"\d\d_\w+#[\w-]+|(data|experiments)/(\w[\w.-]*/)*\w[\w.-]*\.(jsonl?|md|yaml)")


def faults(entry: dict) -> list[str]:
    """Where an entry does not follow the schema of data/claims/README.md."""
    must = {"id", "claim", "verdict", "correct", "source", "evidence"}
    if not must <= entry.keys() <= must | {"never"}:
        return [f"the keys {entry.keys() ^ must}"]
    never, evidence = entry.get("never", [{"pattern": "x", "example": "x"}]), entry["evidence"]

    def are_texts(values) -> bool:
        return all(isinstance(value, str) and value.strip() for value in values)

    rules = {
        "texts": are_texts(entry[key] for key in must - {"evidence"}),
        "verdict": entry["verdict"] in VERDICTS,
        "evidence": isinstance(evidence, list) and evidence and all(map(EVIDENCE.fullmatch, evidence)),
        "never": never and all({"pattern", "example"} == one.keys() and are_texts(one.values()) for one in never),
    }
    return [name for name, holds in rules.items() if not holds]


def test_the_file_follows_the_schema():
    raw = yaml.safe_load((ROOT / "data" / "claims" / "claims.yaml").read_text(encoding="utf-8"))
    assert {entry.get("id"): found for entry in raw if (found := faults(entry))} == {}


@pytest.mark.parametrize(("change", "fault"), [
    ({"sources": "s"}, "the keys"), ({"verdict": "TRUE"}, "verdict"), ({"correct": " "}, "texts"),
    ({"claim": 5}, "texts"), ({"evidence": []}, "evidence"), ({"evidence": ["C20"]}, "evidence"),
    ({"evidence": ["02_lora_math"]}, "evidence"), ({"evidence": ["data/../README.md"]}, "evidence"),
    ({"never": [{"pattern": "x"}]}, "never"), ({"never": []}, "never"),
    ({"never": [{"pattern": 5, "example": "x"}]}, "never"),
])  # fmt: skip
def test_the_schema_refuses(change, fault):
    good = {"id": "C01", "claim": "c", "verdict": "COND", "correct": "t", "source": "s", "evidence": ["02_lora#a"]}
    assert faults(good) == [] and faults(good | change)[0].startswith(fault)


# --- The rules find something -----------------------------------------------------------------------------------------


def test_a_cell_or_file_that_is_not_there_is_noticed():
    with pytest.raises(KeyError, match="02_lora_math#lora-999"):
        cells_of(SimpleNamespace(evidence=["02_lora_math#lora-999"]))
    with pytest.raises(KeyError, match=r"data/none\.json"):
        cells_of(SimpleNamespace(evidence=["02_lora_math#count", "data/none.json"]))


def test_sentences_are_told_apart():
    text = "## Speed (C20)\n\nOne. **Two** is *here*! <b>Three?</b>\n- an item\n\n| a | b. c |"
    assert sentences(text) == ["## Speed (C20)", "One.", "Two is here!", "Three?", "- an item", "| a | b. c |"]
