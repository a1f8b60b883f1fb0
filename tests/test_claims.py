"""data/claims: every claim once, every cell there, nothing false said as true.

Each rule is a function from a text to its faults; the last section shows that each can find one.
"""

import collections
import re

import pytest
import yaml

from ftlab.classroom import claims, page
from ftlab.classroom.claims import VERDICTS, Claim, ClaimError, load
from notebooks import CELLS, ROOT

IDS = [*(f"C{n:02d}" for n in range(1, 104)), *(f"X{n}" for n in range(1, 10))]
CLAIMS = {claim.id: claim for claim in load()}
MARKDOWN = {name: "".join(cell["source"]) for name, cell in CELLS.items() if cell["cell_type"] == "markdown"}
PROSE = MARKDOWN | {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}

# --- The ledger -------------------------------------------------------------------------------------------------------


def test_every_claim_stands_there_once_and_in_order():
    assert [claim.id for claim in load()] == IDS


def cells_of(claim: Claim) -> list[dict]:
    """The cells of its evidence; KeyError with the name of a cell or data file if there is none."""
    files = {cell for cell in claim.evidence if "#" not in cell}
    if missing := [file for file in files if not (ROOT / file).is_file()]:
        raise KeyError(missing[0])
    return [CELLS[cell] for cell in claim.evidence if cell not in files]


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=lambda claim: claim.id)
def test_its_evidence_is_there_and_of_the_kind_that_it_names(claim):
    """What is computed or measured is so in a code cell that shows something; else it is cited or said to be open."""
    shows = [cell for cell in cells_of(claim) if cell["cell_type"] == "code" and cell["outputs"]]
    if re.search(r"\b(computed|measured|counted)\b", claim.source):
        assert shows
    else:
        assert re.search(
            r"arXiv:\d{4}\.\d{5}|no source found|README|wiki|blog|page|terms|packages|TRL \d|PEFT \d", claim.source
        )


def test_every_claim_has_a_cell_that_shows_or_discusses_it():
    assert [claim.id for claim in load() if not claim.evidence] == []


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


def stated(claim: Claim, markdown: str) -> list[str]:
    """The sentences that state what is false, as the course's own word.

    Not: a question; a sentence or row that names a claim, the article or somebody who says so; words in quotes.
    """

    def own(sentence: str) -> bool:
        another = re.search(r"\b[CX]\d+\b|\barticle\b|\bsomebody (says|tells)\b", sentence)
        return not another and not sentence.endswith("?")

    unquoted = [
        (sentence, re.sub(r'"[^"]*"', '""', sentence))
        for sentence in sentences(markdown.replace("“", '"').replace("”", '"'))
    ]
    return [
        sentence
        for sentence, outside in unquoted
        for pattern, _ in claim.never
        if own(sentence) and re.search(pattern, outside, re.IGNORECASE)
    ]


FALSE = [claim for claim in load() if claim.verdict in ("WRONG", "DATED")]
GUARDED = [claim for claim in load() if claim.never]


def test_what_is_wrong_or_dated_is_guarded():
    assert [claim.id for claim in FALSE if not claim.never] == []


@pytest.mark.parametrize("claim", GUARDED, ids=lambda claim: claim.id)
def test_no_notebook_states_it_as_true(claim):
    assert {cell: found for cell, text in PROSE.items() if (found := stated(claim, text))} == {}


@pytest.mark.parametrize("claim", GUARDED, ids=lambda claim: claim.id)
def test_a_false_statement_would_be_found(claim):
    """Each pattern finds its example in the middle of a paragraph; and lets it pass as somebody else's word."""
    for pattern, sentence in claim.never:
        alone = Claim(**{**vars(claim), "never": ((pattern, sentence),)})
        assert stated(alone, f"A word before. {sentence} A word after.") == [sentence]
        assert stated(alone, f"| a row | {sentence} |")
        for excused in (
            f'It says "{sentence}"',
            f"The article says: {sentence}",
            f"| {claim.id} | {sentence} | wrong |",
        ):
            assert stated(alone, excused) == []


@pytest.mark.parametrize("claim", GUARDED, ids=lambda claim: claim.id)
def test_what_is_true_of_a_claim_is_not_what_is_false(claim):
    assert not any(re.search(pattern, claim.correct, re.IGNORECASE) for pattern, _ in claim.never)


# --- ftlab.classroom.claims -------------------------------------------------------------------------------------------


def ids(*narrowed, **by) -> set[str]:
    return set(claims.table(*narrowed, **by).index)


def test_table_narrows_by_verdict_words_and_notebook():
    everything = claims.table()
    assert list(everything.index) == IDS
    assert list(everything.columns) == ["claim", "verdict", "correct", "source", "evidence"]
    assert everything.loc["C15", "evidence"] == "02_lora_math#targets"
    assert everything.loc["C02", "evidence"] == "01_why_fine_tune#four-kinds, 04_rlhf_vs_dpo#task-says"
    assert ids("DATED") == {"C67", "C68", "C94", "C97", "C99"}
    for verdict in VERDICTS:
        assert ids(verdict) == {claim.id for claim in load() if claim.verdict == verdict} != set()
    memory = ids("WRONG", text="MEMORY frozen")
    assert "C27" in memory and "C20" not in memory
    with pytest.raises(ValueError, match="got verdict='FALSE', wanted one of"):
        claims.table("FALSE")


def test_table_searches_all_its_texts_for_all_the_words():
    for word in ("c20", "two to five", "0.674", "biderman"):  # id, claim, correct, source
        assert "C20" in ids(text=word)
    assert ids(text="c20 0.674") <= ids(text="0.674") and "C20" in ids(text="c20 0.674")
    assert ids(text="no such words") == ids(text="0.674 no-such-word") == set()


def test_table_takes_the_beginning_of_a_notebooks_name():
    shown_in_06 = {claim.id for claim in load() if any(cell.startswith("06_") for cell in claim.evidence)}
    assert ids(notebook="06") == ids(notebook="06_orpo_kto_spin") == shown_in_06 and "C77" in shown_in_06
    assert ids(notebook="lora") == ids(notebook="6") == set(), "the beginning, not any part"


def shown(ledger: claims.Ledger) -> str:
    return ledger._table.outputs[0]["data"]["text/html"]


def test_the_controls_narrow_what_is_shown():
    ledger = claims.ledger()
    assert [claim.id for claim in ledger.shown] == IDS and "112 of 112 claims" in shown(ledger)
    ledger.verdict.value = "WRONG"
    ledger.text.value = "forget"
    found = [claim.id for claim in ledger.shown]
    assert {"C28", "C29", "X4"} <= set(found) <= ids("WRONG")
    assert f"{len(found)} of 112 claims" in shown(ledger) and ">C20<" not in shown(ledger)
    ledger.verdict.value, ledger.text.value = "", "nothing like it"
    assert ledger.shown == [] and "0 of 112 claims" in shown(ledger)
    ledger.text.value, ledger.notebook.value = "", "03_qlora_memory"
    assert {claim.id for claim in ledger.shown} == ids(notebook="03_qlora_memory") > {"C32", "C46"}
    assert "03_qlora_memory.ipynb#cell-id=table" in shown(ledger)
    assert ledger._table.outputs[0]["data"]["text/plain"] == f"{len(ledger.shown)} claims"


def test_the_ledger_can_be_used_by_keyboard_and_by_ear():
    ledger = claims.ledger()
    assert ledger._widget.children == (ledger.verdict, ledger.notebook, ledger.text, ledger._table)
    assert 'overflow: auto" tabindex="0">' in shown(ledger) and re.search('role="status"[^>]*>112 of', shown(ledger))
    heads = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', shown(ledger))
    assert heads == ["", "verdict", "the article", "what is true"]


def test_the_choices_count_their_claims_and_begin_with_all():
    ledger = claims.ledger()
    assert ledger.verdict.options[0] == ("all verdicts", "") and ledger.notebook.options[0] == ("all notebooks", "")
    assert ledger.verdict.value == ledger.notebook.value == "", "in JupyterLab None would be an empty line"
    assert all(label.startswith(f"{value}, {VERDICTS[value]} (") for label, value in ledger.verdict.options[1:])
    counted = {value: int(re.search(r"\((\d+)\)$", label)[1]) for label, value in ledger.verdict.options[1:]}
    assert counted == collections.Counter(claim.verdict for claim in load())
    notebooks = {cell.partition("#")[0] for claim in load() for cell in claim.evidence if "#" in cell}
    assert ledger.notebook.options[1:] == tuple((name, name) for name in sorted(notebooks))


def test_without_a_kernel_every_claim_is_there_with_links_to_its_cells():
    """Whatever the controls have narrowed: they are not there to widen it again."""
    ledger = claims.ledger()
    ledger.verdict.value = "DATED"
    bundle = ledger._repr_mimebundle_()
    still = bundle["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in bundle and "112 claims" in bundle["text/plain"]
    assert all(f">{id}<" in still for id in IDS)
    for cell in {cell for claim in load() for cell in claim.evidence}:
        name, _, id = cell.partition("#")
        assert f'href="{name}.ipynb#cell-id={id}"' in still if id else f'href="../{name}">{name}</a>' in still
    folded = dict(re.findall(r"<details><summary><b>(\w+)</b>, .*?: (\d+)</summary>", still))
    assert folded == {name: str(count) for name, count in collections.Counter(c.verdict for c in load()).items()}


def test_the_claims_with_some_verdicts_as_a_page(monkeypatch):
    pages = []
    monkeypatch.setattr(claims, "display", lambda bundle, raw: pages.append(bundle["text/html"] if raw else None))
    claims.show("DATED", "WRONG")
    wanted = [claim.id for claim in load() if claim.verdict in ("DATED", "WRONG")]
    assert re.findall(r'scope="row"[^>]*>(\w+)<', pages[0]) == wanted
    with pytest.raises(ValueError, match=r"got \['FALSE'\]"):
        claims.show("WRONG", "FALSE")
    assert len(pages) == 1


def test_a_line_of_the_table_by_hand():
    """Escaped, code between backticks, coloured by its verdict, the source before the links."""
    evil = Claim("C01", "<script>1</script>", "WRONG", "a `p < q` b", "x & y", ("02_lora_math#count",))
    look = "text-align: left; vertical-align: top; white-space: normal; padding: 0.2em 0.8em 0.2em 0"
    assert (
        f'<tr><th scope="row" style="{look}">C01</th>'
        f'<td style="{look}; border-left: 4px solid #D55E00; padding-left: 0.6em">WRONG</td>'
        f'<td style="{look}">&lt;script&gt;1&lt;/script&gt;</td><td style="{look}">a <code>p &lt; q</code> b<br><small>'
        f"x &amp; y · {page.link('02_lora_math#count')}</small></td></tr>"
    ) in claims._as_html([evil])
    assert claims.COLOURS.keys() == VERDICTS.keys() and len(set(claims.COLOURS.values())) == len(VERDICTS)


ENTRY = {
    "id": "C01",
    "claim": "c",
    "verdict": "COND",
    "correct": "t",
    "source": "s",
    "evidence": ["02_lora_math#count"],
}
BROKEN = [
    ("no list", {}, "wanted a list of claims"),
    ("no mapping", ["C01"], "a mapping with id"),
    ("a key misspelt", [ENTRY | {"sources": "s"}], "the keys .* got"),
    ("a key missing", [{k: v for k, v in ENTRY.items() if k != "source"}], "the keys .*'source'"),
    ("a verdict that there is not", [ENTRY | {"verdict": "TRUE"}], "a verdict of .*, got 'TRUE'"),
    ("an empty text", [ENTRY | {"correct": " "}], "text in correct"),
    ("a number for a text", [ENTRY | {"claim": 5}], "text in claim, got 5"),
    ("evidence as a mapping", [ENTRY | {"evidence": {"02_lora_math#count": 1}}], "evidence as a list of cells"),
    ("evidence without a cell", [ENTRY | {"evidence": ["02_lora_math"]}], "cells like 02_lora_math#count"),
    ("a pattern without an example", [ENTRY | {"never": [{"pattern": "x"}]}], "never as a list of pattern and example"),
    ("a pattern and more", [ENTRY | {"never": [dict.fromkeys(("pattern", "example", "why"), "x")]}], "never as"),
    ("a pattern that is none", [ENTRY | {"never": [{"pattern": "(", "example": "x"}]}], "no regular expression"),
    ("a claim as evidence", [ENTRY | {"evidence": ["C20"]}], "cells like 02_lora_math#count"),
    ("a file of another folder", [ENTRY | {"evidence": ["ftlab/README.md"]}], "files of data/"),
    ("a file above data", [ENTRY | {"evidence": ["data/../README.md"]}], "files of data/"),
    ("a file of another kind", [ENTRY | {"evidence": ["data/pictures/lora.svg"]}], "files of data/"),
    ("a cell with more to it", [ENTRY | {"evidence": ["02_lora_math#count, 11"]}], "cells like 02_lora_math#count"),
    ("a pattern that is a number", [ENTRY | {"never": [{"pattern": 5, "example": "x"}]}], "5 is no regular expression"),
    ("patterns as a mapping", [ENTRY | {"never": {}}], "never as a list of pattern and example"),
    ("an id twice", [ENTRY, ENTRY], "the id 'C01' stands twice"),
]


@pytest.mark.parametrize(("content", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_ledger_is_refused_with_the_reason(tmp_path, content, message):
    file = tmp_path / "claims.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ClaimError, match=message):
        load(file)


# --- The rules find something -----------------------------------------------------------------------------------------


def test_a_cell_or_file_that_is_not_there_is_noticed():
    with pytest.raises(KeyError, match="02_lora_math#lora-999"):
        cells_of(Claim("C01", "c", "COND", "t", "computed", ("02_lora_math#lora-999",)))
    with pytest.raises(KeyError, match=r"data/none\.json"):
        cells_of(Claim("C01", "c", "COND", "t", "computed", ("02_lora_math#count", "data/none.json")))


def test_sentences_are_told_apart():
    text = "## Speed (C20)\n\nOne. **Two** is *here*! <b>Three?</b>\n- an item\n\n| a | b. c |"
    assert sentences(text) == ["## Speed (C20)", "One.", "Two is here!", "Three?", "- an item", "| a | b. c |"]
