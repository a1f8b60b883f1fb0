"""Notebook 11 keeps what it promises: the article's questions answered in the open, the whole deck, links that lead."""

import re

import pytest

from ftlab.classroom import cards, claims, interview, whiteboard
from notebooks import CELLS, NOTEBOOKS, ROOT

NAME = "11_interview_prep"
ALL = cards.load()


def source(id: str) -> str:
    return "".join(CELLS[f"{NAME}#{id}"]["source"])


def pages(id: str) -> str:
    """All that a cell has put out as HTML: what a page without a kernel shows of it."""
    outputs = CELLS[f"{NAME}#{id}"]["outputs"]
    return "\n".join("".join(output.get("data", {}).get("text/html", "")) for output in outputs)


def in_the_open(html: str) -> str:
    """What can be read without unfolding anything."""
    return re.sub(r"<details>.*?</details>", "", html, flags=re.S)


def test_the_title_counts_right():
    asked = [card for card in ALL if card.article]
    title = source("title")
    assert f"and to {len(ALL) - len(asked)} more" in title and f"{len(claims.load())} claims" in title


@pytest.mark.parametrize("card", [card for card in ALL if card.article], ids=lambda card: card.article)
def test_each_question_of_the_article_is_answered_in_the_open(card):
    """With 30 seconds, 2 minutes, what is asked next, what is weak, and links; in one cell of the first section."""
    cells = ("ask-lora", "ask-rlhf-dpo", "ask-rag", "ask-qlora", "ask-mistakes", "faq")
    (id,) = [id for id in cells if f'"{card.id}"' in source(id)]
    assert card.opened() in in_the_open(pages(id))
    for part in ("30 seconds", "90 seconds", "Asked next", "A weak answer", "Evidence"):
        assert f"<b>{part}</b>" in card.opened()
    assert len(re.findall(r'<a style="[^"]*" href=', card.opened())) >= len(card.proof) >= 3


def test_the_whole_deck_is_there_from_junior_to_staff():
    assert len(ALL) >= 60 and all(card.folded() in pages("deck") for card in ALL)
    table = re.sub(r"<[^>]+>", " ", pages("deck-table"))
    heads = re.search(r"level\s+(.*?)\s+topic", table, re.S)[1].split()
    assert heads == ["junior", "mid", "senior", "staff", "all"]
    counts = [sum(card.level == level for card in ALL) for level in cards.LEVELS]
    assert list(map(int, re.search(r"\ball\s+((?:\d+\s+){5})", table)[1].split())) == [*counts, len(ALL)]


def test_the_mock_interview_shows_a_finished_report():
    """Of the cards that the dial's seed and level give, with the sums of the marks in the cell."""
    report = in_the_open(pages("mock-demo"))
    assert "<b>16 of 24 points.</b>" in report and "lost on <b>evidence</b>" in report and "150 s, too long" in report
    assert len(re.findall(r'<th scope="row"', report)) == 3
    assert [name for name in interview.RUBRIC if f"| {name} |" in source("mock-says")] == list(interview.RUBRIC)
    assert pages("mock").count("<details>") == 6


def test_the_whiteboard_shows_one_of_each_and_one_solved_with_its_slips():
    assert pages("board").count("<details>") == len(whiteboard.PROBLEMS)
    rows = re.findall(r"<td>(True|False)</td>", pages("solved"))
    assert rows[0] == "True" and rows[1:] == ["False"] * 3
    assert "right:" in "".join(CELLS[f"{NAME}#solved"]["outputs"][0]["text"]), "equal to the loss of notebook 04"


def test_what_is_wrong_or_dated_is_spelled_out_in_the_open():
    shown = in_the_open(pages("wrong"))
    for claim in claims.load():
        assert (f">{claim.id}</th>" in shown) == (claim.verdict in ("WRONG", "DATED")), claim.id
    assert all(f">{claim.id}</th>" in pages("ledger") for claim in claims.load())


def test_the_cheat_sheet_is_that_of_the_cards():
    assert cards.cheat_sheet().data in pages("sheet")


def test_every_link_leads_to_a_cell_a_data_file_or_a_page_that_the_notebook_writes():
    text = "\n".join("".join(cell["source"]) for cell in NOTEBOOKS[NAME])
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    for id in (cell["id"] for cell in NOTEBOOKS[NAME] if cell["cell_type"] == "code"):
        found += [link for link in re.findall(r'href="([^"]+)"', pages(id)) if not link.startswith("https://")]
        for output in CELLS[f"{NAME}#{id}"]["outputs"]:
            found += re.findall(r"\]\(([^)\s]+)\)", "".join(output.get("data", {}).get("text/markdown", "")))
    cells = {link.replace(".ipynb#cell-id=", "#") for link in found} - {"runs/cheat_sheet.html"}
    files = {link for link in cells if link.startswith("../data/") and (ROOT / "notebooks" / link).is_file()}
    assert len(cells) > 100 and sorted(cells - set(CELLS) - files) == []
    assert 'RUNS / "cheat_sheet.html"' in source("sheet") and 'RUNS = Path("runs")' in source("dial")


def test_each_sentence_not_to_be_said_has_another_one_and_a_place():
    rows = re.findall(r"^\| (“.+”) \| (.+) \| (.+) \|$", source("say"), re.M)
    assert len(rows) >= 12 and all(len(say) > 25 for _, say, _ in rows)
    shown = [place for *_, place in rows if "#cell-id=" in place]
    assert len(shown) >= len(rows) - 2, "all but two can be shown in a cell"
    assert {place[9:11] for place in shown} >= {f"{n:02d}" for n in range(1, 7)}


def test_nothing_of_somebodys_own_progress_is_in_it():
    (empty,) = [line for line in pages("progress").splitlines() if line]
    assert "Where the notebook runs" in empty
    table = pages("progress-demo").split("quiz</th>")[1]
    counts = re.findall(r"<td>(\d+)</td>\s*<td>(\d+)</td>\s*<td>\d+</td>\s*</tr>", table)
    assert len(counts) == len(NOTEBOOKS) and set(counts) == {("0", "0")}, "run it with FTLAB_PROGRESS on a new file"
